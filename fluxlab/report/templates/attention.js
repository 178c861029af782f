"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const data = JSON.parse(one("#attention-data").textContent);
  const grids = all("table.grid");
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const colours = bytes(data.colours);
  const number = (value) => String(Number(value.toPrecision(2)));

  // ── maps of a cell: the largest values, then all in 1/255 of them, as attention_page.pack has them ──
  const opened = new Map();
  function maps(view, variant) {
    const key = view.maps[variant];
    if (!key) return null;
    if (!opened.has(key)) {
      const content = bytes(key);
      const count = view.words.length * view.steps.length * view.blocks.length;
      opened.set(key, { tops: new Float32Array(content.buffer, 0, count), shares: content.subarray(4 * count) });
    }
    return opened.get(key);
  }
  function heat(view, variant, word, step, block) {
    const found = maps(view, variant);
    if (!found) return null;
    const [rows, cols] = view.size;
    const n = (word * view.steps.length + step) * view.blocks.length + block;
    const shares = found.shares.subarray(n * rows * cols, (n + 1) * rows * cols);
    const at = shares.indexOf(255);
    return { rows, cols, top: found.tops[n], shares, row: Math.floor(Math.max(0, at) / cols), col: Math.max(0, at) % cols };
  }
  function paint(canvas, map, highest, opacity) {
    canvas.width = map.cols;
    canvas.height = map.rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(map.cols, map.rows);
    map.shares.forEach((share, i) => {
      const value = highest > 0 ? (share / 255) * (map.top / highest) : 0;
      const colour = 3 * Math.round(255 * value);
      image.data.set([...colours.subarray(colour, colour + 3), Math.round(255 * opacity * (0.35 + 0.65 * value))], 4 * i);
    });
    context.putImageData(image, 0, 0);
  }
  for (const key of all(".look .key")) {
    const shares = Uint8Array.from({ length: 256 }, (_, i) => i);
    paint(key, { rows: 1, cols: 256, top: 1, shares }, 1, 1);
  }

  // ── a choice of word, block, step and opacity; the same for the section and for the comparison ──
  function fill(select, labels, hidden = labels.length < 2) {
    const before = select.selectedIndex;
    select.replaceChildren(...labels.map(([value, text]) => new Option(text, value)));
    select.selectedIndex = Math.min(Math.max(0, before), labels.length - 1);
    select.parentElement.hidden = hidden;
  }
  const numbered = (labels) => labels.map((label, i) => [i, label]);
  function keep(select, labels) {  // the word that was chosen, where it is there, too
    const before = select.selectedOptions[0]?.text;
    fill(select, labels, false);
    const again = labels.findIndex(([, text]) => text === before);
    const telling = labels.findIndex(([value, text]) => value === "" || text.replace(/#\d+$/, "").length > 2);  // rather than an article
    select.selectedIndex = Math.max(0, again >= 0 ? again : telling);
  }
  function bound(range, labels, word) {
    range.max = labels.length - 1;
    if (Number(range.value) > range.max) range.value = 0;
    range.parentElement.hidden = labels.length < 2;
    const text = labels[range.value] === "mean" ? `mean of all ${word}s` : labels[range.value];
    range.nextElementSibling.textContent = text;
    range.setAttribute("aria-valuetext", `${word} ${text}`);
  }
  function stops(root, view) {
    const at = Object.fromEntries(["block", "step", "opacity"].map((name) => [name, one(`[name=${name}]`, root)]));
    bound(at.block, view.blocks, "block");
    bound(at.step, view.steps, "step");
    at.opacity.nextElementSibling.textContent = `${at.opacity.value} %`;
    at.opacity.setAttribute("aria-valuetext", `${at.opacity.value} % opacity`);
    return { block: Number(at.block.value), step: Number(at.step.value), opacity: at.opacity.value / 100 };
  }
  const scale = (root, top) => { one(".top", root).textContent = number(top); };
  const told = (map, word) => `largest ${number(map.top)} at row ${map.row + 1}, column ${map.col + 1} of ${map.rows} × ${map.cols}`;

  // ── side by side ──
  const look = one("#look");
  const field = (name) => one(`[name=${name}]`, look);
  const sides = ["baseline", "variant"].map((side) => one(`.pair .${side}`));
  function choose() {
    fill(field("run"), numbered(data.runs.map((run) => run.name)));
    const run = data.runs[field("run").value];
    fill(field("prompt"), numbered(run.prompts.map((prompt) => prompt.prompt || "(empty prompt)")));
    fill(field("variant"), numbered(run.variants).slice(1));
    fill(field("view"), numbered(run.views));
    const prompt = run.prompts[field("prompt").value];
    const view = prompt.views[field("view").value];
    keep(field("word"), numbered(view.words));
    const { block, step, opacity } = stops(look, view);
    const word = Number(field("word").value);
    const variants = run.variants.length > 1 ? [0, Number(field("variant").value)] : [0];
    const shown = variants.map((variant) => heat(view, variant, word, step, block));
    const highest = Math.max(...shown.map((map) => map?.top ?? 0));
    sides.forEach((figure, i) => {
      figure.hidden = i >= variants.length;
      if (figure.hidden) return;
      const name = run.variants[variants[i]];
      const source = one("img", grids[run.table].tBodies[0].rows[variants[i]].cells[prompt.column + 1]);
      const image = one("img", figure);
      image.hidden = !source;
      if (source) image.src = source.src;
      image.alt = source?.alt ?? "";
      one("b", figure).textContent = `${name}, seed ${prompt.seed}`;
      const canvas = one("canvas", figure);
      canvas.hidden = !shown[i];
      one(".largest", figure).textContent = shown[i] ? told(shown[i]) : "nothing captured";
      if (!shown[i]) return;
      paint(canvas, shown[i], highest, opacity);
      canvas.style.position = source ? "" : "static";
      canvas.setAttribute("aria-label", `${name}: attention and “${view.words[word]}”, ${told(shown[i])}`);
    });
    scale(look, highest);
  }
  look.addEventListener("input", choose);
  choose();

  // ── in the comparison: over both pictures, where the cell's maps are on the page ──
  const dialog = one("#compare");
  const within = one("#dialog-attention");
  const stage = one(".stage", dialog);
  const over = ["variant", "baseline"].map((side) => {
    const canvas = document.createElement("canvas");
    canvas.className = side;
    canvas.ariaHidden = "true";
    one(`img.${side}`, stage).after(canvas);
    return canvas;
  });
  let place = null;
  function compare() {
    const run = data.runs.find((other) => other.table === place.grid);
    const prompt = run?.prompts.find((other) => other.column === place.column);
    within.hidden = !prompt;
    stage.classList.remove("looked");
    if (!prompt) return;
    fill(one("[name=view]", within), numbered(run.views));
    const view = prompt.views[one("[name=view]", within).value];
    keep(one("[name=word]", within), [["", "none"], ...numbered(view.words)]);
    const { block, step, opacity } = stops(within, view);
    const word = one("[name=word]", within).value;
    for (const part of all(".stop, .scale, .view", within)) part.classList.toggle("away", word === "");
    if (word === "") return;
    const shown = [place.variant, 0].map((variant) => heat(view, variant, Number(word), step, block));
    const highest = Math.max(...shown.map((map) => map?.top ?? 0));
    over.forEach((canvas, i) => shown[i] && paint(canvas, shown[i], highest, opacity));
    over[1].style.clipPath = one("img.baseline", stage).style.clipPath;
    stage.classList.add("looked");
    scale(within, highest);
  }
  dialog.addEventListener("compare", (event) => {
    place = event.detail;
    compare();
  });
  within.addEventListener("input", compare);
})();
