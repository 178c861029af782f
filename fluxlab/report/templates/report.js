"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  document.documentElement.classList.add("js");

  // ── cells, read once from the tables: the rows of the table of cells have the order of the images ──
  const table = one("table.cells");
  const metrics = all("thead [data-metric]", table).map((th) => ({ name: th.dataset.metric, label: th.dataset.metric + (th.dataset.unit && ` (${th.dataset.unit})`), column: th.cellIndex }));
  const rows = all("tbody tr", table);
  const grids = all("table.grid").map((grid) => ({
    columns: all("thead tr:last-child th", grid).slice(1),
    groups: all("thead tr:first-child th", grid).map((th) => ({ th, count: th.colSpan })),
    lines: all("tbody tr", grid).map((line) => ({ line, cells: [] })),
  }));
  const cells = [];
  for (const grid of grids) {
    grid.lines.forEach(({ line, cells: row }, y) => {
      const head = one("th", line);
      all("td", line).forEach((td, x) => {
        const record = rows[cells.length];
        const prompt = one(".prompt", record);
        const cell = {
          grid, x, y, td, row: record, shown: true,
          button: one("button", td), image: one("img", td),
          variant: one("th", record).textContent, prompt: prompt.textContent, seed: prompt.nextElementSibling.textContent,
        };
        cell.text = `${head.textContent} ${cell.prompt} seed ${cell.seed}`.toLowerCase();
        row.push(cell);
        cells.push(cell);
      });
    });
  }
  const number = (text) => (text === "" ? NaN : text === "∞" ? Infinity : Number(text));
  const entry = (cell, metric) => cell.row.cells[metric.column];

  // ── tables that are wider than the window: fade their cut edge and say that they scroll ──
  for (const scroll of all("main .scroll")) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = "More columns: scroll to the right →";
    scroll.before(hint);
    const update = () => {
      const left = scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft;
      scroll.classList.toggle("cut", left > 1);
      hint.hidden = left <= 1;
    };
    update();
    scroll.addEventListener("scroll", update, { passive: true });
    const observer = new ResizeObserver(update);
    for (const part of [scroll, scroll.firstElementChild]) observer.observe(part);
  }

  // ── sorting: ascending, descending, original order; rows without a value stay last ──
  for (const sortable of all("table.sortable")) {
    const bodies = all("tbody", sortable).map((body) => ({ body, before: [...body.rows] }));
    const heads = all("thead th", sortable);
    heads.forEach((th, column) => one("button", th).addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[th.ariaSort];
      for (const other of heads) other.ariaSort = "none";
      th.ariaSort = next;
      for (const { body, before } of bodies) body.append(...(next === "none" ? before : sorted(before, column, next === "ascending" ? 1 : -1)));
    }));
  }
  function sorted(before, column, sign) {
    const keyed = before.map((row) => {
      const text = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      return { row, text, value: number(text) };
    });
    const words = keyed.some(({ text, value }) => text !== "" && Number.isNaN(value));
    const empty = ({ text }) => text === "";
    const compare = (a, b) => (words ? a.text.localeCompare(b.text) : a.value === b.value ? 0 : a.value - b.value);
    keyed.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : sign * compare(a, b)));
    return keyed.map(({ row }) => row);
  }

  // ── filter: rows and columns of the grid without a match are hidden, other cells that do not match turn faint ──
  const form = one("form.filter");
  function filter() {
    const fields = form.elements;
    const words = fields.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const phrase = words.join(" ").match(/seed \d+/g) ?? [];
    const metric = metrics.find(({ name }) => name === fields.metric.value);
    const least = fields.least.value === "" ? -Infinity : Number(fields.least.value);
    const most = fields.most.value === "" ? Infinity : Number(fields.most.value);
    const bounded = least > -Infinity || most < Infinity;
    for (const cell of cells) {
      const value = bounded ? number(entry(cell, metric).dataset.value) : 0;
      cell.shown = words.every((word) => cell.text.includes(word)) && phrase.every((seed) => `${cell.text} `.includes(`${seed} `))
        && (!bounded || (value >= least && value <= most));
      cell.row.classList.toggle("away", !cell.shown);
      cell.td.classList.toggle("faint", !cell.shown);
    }
    for (const grid of grids) show(grid);
    updateTabStops();
    one("output", form).textContent = `${cells.filter((cell) => cell.shown).length} of ${cells.length} cells`;
  }
  function show({ columns, groups, lines }) {
    for (const { line, cells: row } of lines) line.classList.toggle("away", !row.some((cell) => cell.shown));
    const used = columns.map((_, x) => lines.some(({ cells: row }) => row[x].shown));
    columns.forEach((th, x) => th.classList.toggle("away", !used[x]));
    for (const { cells: row } of lines) row.forEach((cell, x) => cell.td.classList.toggle("away", !used[x]));
    let first = 0;
    for (const { th, count } of groups) {
      const left = used.slice(first, first + count).filter(Boolean).length;
      th.classList.toggle("away", left === 0);
      th.colSpan = Math.max(1, left);
      first += count;
    }
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  // ── from image to image: each grid is one stop of the Tab key, arrow keys move inside it ──
  const reachable = (cell) => cell.shown && cell.image;
  function neighbour(cell, dx, dy) {
    const { lines } = cell.grid;
    for (let x = cell.x + dx, y = cell.y + dy; lines[y]?.cells[x]; x += dx, y += dy) {
      if (reachable(lines[y].cells[x])) return lines[y].cells[x];
    }
    return null;
  }
  function updateTabStops(focused = null) {
    for (const grid of grids) {
      const images = grid.lines.flatMap(({ cells: row }) => row).filter((cell) => cell.image);
      if (focused && focused.grid !== grid) continue;
      const stop = focused ?? images.find((cell) => reachable(cell));
      for (const cell of images) cell.button.tabIndex = cell === stop ? 0 : -1;
    }
  }
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [-1, 0], PageDown: [1, 0] };
  for (const cell of cells) {
    if (!cell.image) continue;
    cell.button.addEventListener("click", () => open(cell));
    cell.button.addEventListener("keydown", (event) => {
      const next = moves[event.key] && neighbour(cell, ...moves[event.key]);
      if (!next || event.key.startsWith("Page")) return;
      event.preventDefault();
      updateTabStops(next);
      next.button.focus();
    });
  }
  for (const cell of cells) one(".open", cell.row).addEventListener("click", () => cell.image && open(cell));

  // ── one image over the baseline of the same prompt and seed ──
  const dialog = one("#compare");
  const slider = one("input[type=range]", dialog);
  let current = null;
  function open(cell) {
    slider.value = 50;
    compare(cell);
    dialog.showModal();
    slider.focus();
  }
  function compare(cell) {
    current = cell;
    const baseline = cell.grid.lines[0].cells[cell.x];
    one("h2", dialog).textContent = `${cell.variant}, seed ${cell.seed}`;
    one(".prompt", dialog).textContent = cell.prompt;
    one(".stage .variant", dialog).src = cell.image.src;
    one(".stage .variant", dialog).alt = cell.image.alt;
    one(".stage .baseline", dialog).src = (baseline.image ?? cell.image).src;
    one(".stage .baseline", dialog).alt = baseline.image ? baseline.image.alt : "the baseline's image is missing";
    const { naturalWidth: width, naturalHeight: height } = cell.image;
    dialog.style.setProperty("--ratio", width / height);
    dialog.style.setProperty("--pixel", document.body.classList.contains("crisp") ? `${width}px` : "1px");  // a whole number of screen pixels per image pixel
    one("thead .name", dialog).textContent = cell.variant;
    one(".ends .name", dialog).textContent = `${cell.variant} ▸`;
    const lines = metrics.map((metric) => {
      const line = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = metric.label;
      line.append(head);
      for (const shown of [cell, baseline]) line.insertCell().textContent = entry(shown, metric).textContent;
      return line;
    });
    one("tbody", dialog).replaceChildren(...lines);
    for (const button of all("[data-move]", dialog)) {  // not disabled, which would lose the focus
      button.ariaDisabled = !neighbour(cell, ...button.dataset.move.split(" ").map(Number));
    }
    slide();
    dialog.dispatchEvent(new CustomEvent("compare", { detail: { grid: grids.indexOf(cell.grid), variant: cell.y, column: cell.x } }));
  }
  function slide() {
    const share = Number(slider.value);
    for (const part of all(".stage .baseline", dialog)) part.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    one(".line", dialog).style.left = `${share}%`;
    slider.setAttribute("aria-valuetext", `${share} % baseline`);
  }
  function move(dx, dy) {
    const next = neighbour(current, dx, dy);
    if (next) compare(next);
  }
  slider.addEventListener("input", slide);
  const stage = one(".stage", dialog);
  function drag(event) {
    if (!event.buttons) return;
    const box = stage.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    slide();
  }
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", drag);
  for (const button of all("[data-move]", dialog)) {
    button.addEventListener("click", () => move(...button.dataset.move.split(" ").map(Number)));
  }
  dialog.addEventListener("keydown", (event) => {
    const [dx, dy] = moves[event.key] ?? [0, 0];
    const otherControl = event.target !== slider && event.target.matches("input[type=range], select");  // they use up and down, too
    const slides = event.key.startsWith("Arrow") && (otherControl || (event.target === slider && dx));
    if ((!dx && !dy) || slides || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(dx, dy);
  });
  one(".close", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    updateTabStops(current);
    current.button.focus();
  });

  // ── copy the command to the clipboard, or select it where that is not allowed ──
  for (const button of all(".copy")) {
    const code = one("code", button.parentElement);
    button.addEventListener("click", async () => {
      let done = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  filter();
})();
