
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const data = JSON.parse(one("#attention-data").textContent);
  const grids = all("table.grid");
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const colours = bytes(data.colours);
  const number = (value) => String(Number(value.toPrecision(2)));

  // ── the maps of a cell: their maxima, then all of them relative to these, as packed by report/attention/page.py ──
  const unpacked = new Map();
  function maps(view, variant) {
    const key = view.maps[variant];
    if (!key) return null;
    if (!unpacked.has(key)) {
      const content = bytes(key);
      const count = view.words.length * view.steps.length * view.blocks.length;
      unpacked.set(key, { tops: new Float32Array(content.buffer, 0, count), shares: content.subarray(4 * count) });
    }
    return unpacked.get(key);
  }
  function heat(view, variant, word, step, block) {
    const cell = maps(view, variant);
    if (!cell) return null;
    const [rows, cols] = view.size;
    const n = (word * view.steps.length + step) * view.blocks.length + block;
    const shares = cell.shares.subarray(n * rows * cols, (n + 1) * rows * cols);
    const peak = Math.max(0, shares.indexOf(255));
    return { rows, cols, top: cell.tops[n], shares, row: Math.floor(peak / cols), col: peak % cols };
  }
  // Opacity grows with the value, as in drawing/attention.py: where there is no attention the image is unchanged.
  function paint(canvas, map, highest, opacity, opaque = false) {
    canvas.width = map.cols;
    canvas.height = map.rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(map.cols, map.rows);
    map.shares.forEach((share, i) => {
      const value = highest > 0 ? (share / 255) * (map.top / highest) : 0;
      const colour = 3 * Math.round(255 * value);
      image.data.set([...colours.subarray(colour, colour + 3), opaque ? 255 : Math.round(255 * opacity * value)], 4 * i);
    });
    context.putImageData(image, 0, 0);
  }
  for (const bar of all(".map-controls .colourbar")) {
    const shares = Uint8Array.from({ length: 256 }, (_, i) => i);
    paint(bar, { rows: 1, cols: 256, top: 1, shares }, 1, 1, true);
  }

  // ── an image in grey by its own formula, [red, green, blue, offset], so that colours of equal luminance stay apart ──
  const svg = (name, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const filters = svg("svg", { width: 0, height: 0, "aria-hidden": "true" });
  filters.style.position = "absolute";
  document.body.append(filters);
  const made = new Map();
  function makeGrey(image, formula) {
    if (!formula) return image.style.removeProperty("--grey");
    const key = formula.join(" ");
    if (!made.has(key)) {
      const id = `grey-${made.size}`;
      const [red, green, blue, offset] = formula;
      const row = `${red} ${green} ${blue} 0 ${offset}`;
      const matrix = svg("feColorMatrix", { type: "matrix", values: `${row} ${row} ${row} 0 0 0 1 0` });
      filters.append(svg("filter", { id, "color-interpolation-filters": "sRGB" }, matrix));
      made.set(key, `url(#${id})`);
    }
    image.style.setProperty("--grey", made.get(key));
  }

  // ── controls for word, block, step and opacity; the same in the section and in the comparison ──
  function fill(select, labels, hidden = labels.length < 2) {
    const before = select.selectedIndex;
    select.replaceChildren(...labels.map(([value, text]) => new Option(text, value)));
    select.selectedIndex = Math.min(Math.max(0, before), labels.length - 1);
    select.parentElement.hidden = hidden;
  }
  const numbered = (labels) => labels.map((label, i) => [i, label]);
  function fillWords(select, labels) {  // keeps the selected word if the new list has it
    const before = select.selectedOptions[0]?.text;
    fill(select, labels, false);
    const same = labels.findIndex(([, text]) => text === before);
    const noun = labels.findIndex(([value, text]) => value === "" || text.replace(/#\d+$/, "").length > 2);  // no article
    select.selectedIndex = Math.max(0, same >= 0 ? same : noun);
  }
  function fillSlider(range, labels, word) {
    range.max = labels.length - 1;
    if (Number(range.value) > range.max) range.value = 0;
    range.parentElement.hidden = labels.length < 2;
    const text = labels[range.value] === "mean" ? `mean of all ${word}s` : labels[range.value];
    range.nextElementSibling.textContent = text;
    range.setAttribute("aria-valuetext", `${word} ${text}`);
  }
  function readSliders(root, view) {
    const range = Object.fromEntries(["block", "step", "opacity"].map((name) => [name, one(`[name=${name}]`, root)]));
    fillSlider(range.block, view.blocks, "block");
    fillSlider(range.step, view.steps, "step");
    range.opacity.nextElementSibling.textContent = `${range.opacity.value} %`;
    range.opacity.setAttribute("aria-valuetext", `${range.opacity.value} % opacity`);
    return { block: Number(range.block.value), step: Number(range.step.value), opacity: range.opacity.value / 100 };
  }
  const setScale = (root, top) => { one(".top", root).textContent = number(top); };
  const describe = (map) => `max ${number(map.top)} at row ${map.row + 1}, column ${map.col + 1} of ${map.rows} × ${map.cols}`;

  // ── the section: baseline and variant next to each other ──
  const controls = one("#attention-controls");
  const field = (name) => one(`[name=${name}]`, controls);
  const sides = ["baseline", "variant"].map((side) => one(`.pair .${side}`));
  function update() {
    fill(field("run"), numbered(data.runs.map((run) => run.name)));
    const run = data.runs[field("run").value];
    fill(field("prompt"), numbered(run.prompts.map((prompt) => prompt.prompt || "(empty prompt)")));
    fill(field("variant"), numbered(run.variants).slice(1));
    fill(field("view"), numbered(run.views));
    const prompt = run.prompts[field("prompt").value];
    const view = prompt.views[field("view").value];
    fillWords(field("word"), numbered(view.words));
    const { block, step, opacity } = readSliders(controls, view);
    const word = Number(field("word").value);
    const variants = run.variants.length > 1 ? [0, Number(field("variant").value)] : [0];
    const shown = variants.map((variant) => heat(view, variant, word, step, block));
    const highest = run.highest[field("view").value] ?? Math.max(...shown.map((map) => map?.top ?? 0));
    sides.forEach((figure, i) => {
      figure.hidden = i >= variants.length;
      if (figure.hidden) return;
      const name = run.variants[variants[i]];
      const source = one("img", grids[run.table].tBodies[0].rows[variants[i]].cells[prompt.column + 1]);
      const image = one("img", figure);
      image.hidden = !source;
      if (source) image.src = source.src;
      image.alt = source?.alt ?? "";
      makeGrey(image, prompt.greys[variants[i]]);
      one("b", figure).textContent = `${name}, seed ${prompt.seed}`;
      const canvas = one("canvas", figure);
      canvas.hidden = !shown[i];
      one(".largest", figure).textContent = shown[i] ? describe(shown[i]) : "nothing captured";
      if (!shown[i]) return;
      paint(canvas, shown[i], highest, opacity, !source);
      canvas.style.position = source ? "" : "static";
      canvas.setAttribute("aria-label", `${name}: attention and “${view.words[word]}”, ${describe(shown[i])}`);
    });
    setScale(controls, highest);
  }
  controls.addEventListener("input", update);
  update();

  // ── the comparison: over both images, if the maps of the cell are on the page ──
  const dialog = one("#compare");
  const inDialog = one("#dialog-attention");
  const stage = one(".stage", dialog);
  const overlays = ["variant", "baseline"].map((side) => {
    const canvas = document.createElement("canvas");
    canvas.className = side;
    canvas.ariaHidden = "true";
    one(`img.${side}`, stage).after(canvas);
    return canvas;
  });
  let cell = null;
  function compare() {
    const run = data.runs.find((other) => other.table === cell.grid);
    const prompt = run?.prompts.find((other) => other.column === cell.column);
    inDialog.hidden = !prompt;
    stage.classList.remove("overlaid");
    if (!prompt) return;
    fill(one("[name=view]", inDialog), numbered(run.views));
    const view = prompt.views[one("[name=view]", inDialog).value];
    fillWords(one("[name=word]", inDialog), [["", "none"], ...numbered(view.words)]);
    const { block, step, opacity } = readSliders(inDialog, view);
    const word = one("[name=word]", inDialog).value;
    for (const part of all(".stop, .scale, .view", inDialog)) part.classList.toggle("away", word === "");
    if (word === "") return;
    const variants = [cell.variant, 0];
    const shown = variants.map((variant) => heat(view, variant, Number(word), step, block));
    const highest = run.highest[one("[name=view]", inDialog).value] ?? Math.max(...shown.map((map) => map?.top ?? 0));
    overlays.forEach((canvas, i) => shown[i] && paint(canvas, shown[i], highest, opacity));
    ["variant", "baseline"].forEach((side, i) => makeGrey(one(`img.${side}`, stage), prompt.greys[variants[i]]));
    overlays[1].style.clipPath = one("img.baseline", stage).style.clipPath;
    stage.classList.add("overlaid");
    setScale(inDialog, highest);
  }
  dialog.addEventListener("compare", (event) => {
    cell = event.detail;
    compare();
  });
  inDialog.addEventListener("input", compare);
})();
