"use strict";
const WIDTH = 640, HEIGHT = 250, LEFT = 62, RIGHT = 24, TOP = 10, BOTTOM = 26;

/** Debiased exponential moving average: m_n = w m_(n-1) + (1 - w) y_n with m_0 = 0, s_n = m_n / (1 - w^n). */
function smoothed(values, weight) {
  let mean = 0, left = 1;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    left *= weight;
    return mean / (1 - left);
  });
}

/** Round values between low and high: 1, 2 or 5 times powers of ten; of a logarithmic axis the powers, or all three. */
function ticks(low, high, log) {
  const marks = [];
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const every = Math.ceil((last - first) / 6), factors = last - first < 3 ? [1, 2, 5] : [1];
    for (let power = first; power <= last; power += every) marks.push(...factors.map((f) => f * 10 ** power));
  } else {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    for (let count = Math.ceil(low / step); count * step <= high; count++) marks.push(count * step);
  }
  return marks.filter((mark) => mark >= low && mark <= high);
}

function told(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size && size < 1e-3)) return value.toExponential(2).replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
}

function made(kind, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

/** One pair of axes: lines of [x, mean, lowest, highest]; the thin line is what was measured, the thick one smoothed. */
class Plot {
  constructor(figure) {
    this.figure = figure;
    this.about = JSON.parse(figure.querySelector("script").textContent);
    this.svg = made("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, figure);
    this.svg.setAttribute("aria-label", figure.querySelector("h3").textContent);
    this.legend = figure.appendChild(document.createElement("p"));
    this.legend.className = "legend";
    const every = this.about.lines.flatMap((line) => line.points);
    this.log = document.createElement("input");
    this.log.type = "checkbox";
    if (every.some((point) => point[1] > 0)) {
      const label = document.createElement("label");
      label.append(this.log, " log y");
      label.title = "on a logarithmic axis values of 0 and less lie on its lower edge";
      figure.querySelector("h3").append(label);
      this.log.checked = Boolean(this.about.log);
    }
    this.log.addEventListener("change", () => this.draw());
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.tell());
    this.draw();
  }

  draw() {
    const weight = this.about.smooth ? Number(document.getElementById("smoothing")?.value ?? 0) : 0;
    this.lines = this.about.lines.map((line) => {
      const means = line.points.map((point) => point[1]);
      return { ...line, means, shown: weight ? smoothed(means, weight) : means };
    });
    const xs = this.lines.flatMap((line) => line.points.map((point) => point[0]));
    const ys = this.lines.flatMap((line) => [...line.means, ...line.shown]);
    this.axes(range(xs, false), range(ys, this.log.checked));
    for (const line of this.lines) this.line(line, weight > 0);
    this.cursor = made("path", { class: "cursor" }, this.svg);
    this.tell();
  }

  axes([left, right], [low, high]) {
    const log = this.log.checked, height = (y) => (log ? Math.log10(Math.max(y, low)) : y);
    const bottom = HEIGHT - BOTTOM, span = height(high) - height(low);
    this.x = (x) => LEFT + ((x - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
    this.y = (y) => Math.min(bottom, Math.max(TOP, bottom - ((height(y) - height(low)) / span) * (bottom - TOP)));
    this.svg.replaceChildren();
    for (const mark of ticks(low, high, log)) {
      made("path", { class: "rule", d: `M${LEFT} ${this.y(mark)}H${WIDTH - RIGHT}` }, this.svg);
      made("text", { x: LEFT - 7, y: this.y(mark) + 4, "text-anchor": "end" }, this.svg, told(mark));
    }
    for (const mark of ticks(left, right, false)) {
      made("text", { x: this.x(mark), y: HEIGHT - 8, "text-anchor": "middle" }, this.svg, told(mark));
    }
    made("text", { class: "unit", x: WIDTH - RIGHT, y: TOP + 8, "text-anchor": "end" }, this.svg, this.about.up);
  }

  line(line, smooth) {
    const at = line.points.map((point) => this.x(point[0])), style = { stroke: line.colour, "vector-effect": "non-scaling-stroke" };
    const band = line.points.some((point) => point[2] < point[3]);
    if (band) {
      const edge = (which) => line.points.map((point, i) => [at[i], this.y(point[which] ?? point[1])]);
      made("path", { class: "band", fill: line.colour, d: path([...edge(2), ...edge(3).reverse()]) + "Z" }, this.svg);
    }
    if (smooth) made("path", { ...style, class: "raw", d: path(line.means.map((y, i) => [at[i], this.y(y)])) }, this.svg);
    made("path", { ...style, class: "line", d: path(line.shown.map((y, i) => [at[i], this.y(y)])) }, this.svg);
    if (line.points.length < 40) {
      line.shown.forEach((y, i) => made("circle", { cx: at[i], cy: this.y(y), r: 2.5, fill: line.colour }, this.svg));
    }
  }

  point(event) {
    const box = this.svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDTH;
    const xs = this.lines.flatMap((line) => line.points.map((point) => point[0]));
    const near = xs.reduce((best, x) => (Math.abs(this.x(x) - at) < Math.abs(this.x(best) - at) ? x : best));
    this.cursor.setAttribute("d", `M${this.x(near)} ${TOP}V${HEIGHT - BOTTOM}`);
    this.tell(near);
  }

  /** The values at `x`, or the last ones, beside the names of the lines. */
  tell(x) {
    if (x === undefined) this.cursor.removeAttribute("d");
    this.legend.replaceChildren(`${this.about.across} ${x === undefined ? "(last)" : told(x)}`);
    for (const line of this.lines) {
      const found = x === undefined ? line.points.length - 1 : line.points.findIndex((point) => point[0] === x);
      const entry = this.legend.appendChild(document.createElement("span"));
      const [, mean, low, high] = line.points[found] ?? [];
      const spread = low < high && told(low) !== told(high) ? ` (${told(low)} to ${told(high)})` : "";
      entry.textContent = line.name + (mean === undefined ? "" : `: ${told(mean)}${spread}`);
      entry.style.borderColor = line.colour;
    }
  }
}

/** Lowest and highest, never so near each other that no number is between them. */
function range(every, log) {
  const values = log ? every.filter((value) => value > 0) : every;
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const size = Math.max(Math.abs(low), Math.abs(high));
  if (high - low > 1e-9 * size) return [low, high];
  return log ? [low / 2, high * 2] : [low - (size / 2 || 0.5), high + (size / 2 || 0.5)];
}

const plots = [...document.querySelectorAll("figure.plot")].map((figure) => new Plot(figure));
const smoothing = document.getElementById("smoothing");
smoothing?.addEventListener("input", () => {
  smoothing.nextElementSibling.textContent = smoothing.value;
  for (const plot of plots) plot.draw();
});

for (const figure of document.querySelectorAll("figure.frames")) {
  const slider = figure.querySelector("input"), pictures = [...figure.querySelectorAll("img")];
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
    figure.querySelector("output").textContent = pictures[slider.value].dataset.label;
  };
  slider.addEventListener("input", show);
  show();
}
