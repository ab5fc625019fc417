// The page of a frontier. Its data stand in #data as JSON; every text of them is set as text, never as HTML.
// One state (which arms are chosen, which answers are shown) and functions that draw a section from it.
// report.py joins this file, report_charts.js and report_browser.js into one function, at whose end it calls start().

const data = JSON.parse(document.getElementById("data").textContent);
const { arms, problems } = data;
const { styles } = data;
const MOST = styles.length; // chosen arms
const FIRST = 8; // of them at the start, as many as there are colours
const PAGE = 20; // problems of the list at a time
const slots = Array(MOST).fill(null); // slot, a style's position -> arm; an arm keeps its style while it is chosen
const home = ranges();
let view = home; // the part of the frontier that is looked at
let printing = false;

// --- small tools ---------------------------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a string child is text. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange" || name === "oninput") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Text for plotly, which reads tags and entities in every text it draws. */
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const slotOf = (arm) => slots.indexOf(arm);
const chosen = () => arms.map((_, arm) => arm).filter((arm) => slotOf(arm) >= 0);
const styleOf = (arm) => styles[slotOf(arm)]; // of a chosen arm
const standingOf = (arm) => arms[arm].standing;
/** The CSS variable of an arm's colour: its own while it is chosen, else dark grey for those that have one in the
    still picture (non-dominated, or dominated within noise) and grey for the others. */
const variableOf = (arm) => {
  if (slotOf(arm) >= 0) return `--c${styleOf(arm).colour}`;
  return ["front", "noise"].includes(standingOf(arm)) ? "--front" : "--grey";
};
const colourOf = (arm) => colour(variableOf(arm));
const symbolOf = (arm) => (slotOf(arm) >= 0 ? styleOf(arm).symbol : "circle");
const FATES = { front: "", noise: "dominated, within noise", dominated: "dominated", collapsed: "collapsed" };
const count = (value) => (Math.abs(value) < 1000 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
const percent = (value) => `${(100 * value).toFixed(1)}%`;
const clipped = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function toggle(arm) {
  const slot = slotOf(arm);
  if (slot >= 0) {
    if (chosen().length > 1) slots[slot] = null;
  } else {
    if (!slots.includes(null))
      slots.splice(
        slots.findIndex((other) => other !== data.parent),
        1,
        null,
      );
    slots[freeSlot(arm)] = arm;
    if (browser.arms[0] !== arm && arm !== data.parent) browser.arms[1] = arm;
  }
  showChoice();
  charts.forEach(draw);
  showProblems();
}

/** The style of the arm's family, as in the still pictures, if no other arm has it; else one that is no family's. */
function freeSlot(arm) {
  if (arms[arm].style !== null && slots[arms[arm].style] === null) return arms[arm].style;
  const families = new Set(arms.map((one) => one.style));
  const spare = slots.findIndex((taken, slot) => taken === null && !families.has(slot));
  return spare >= 0 ? spare : slots.indexOf(null);
}

// --- the choice of arms ------------------------------------------------------------------------------------------------

function showChoice() {
  for (const button of document.querySelectorAll("button[data-arm]")) {
    const arm = Number(button.dataset.arm);
    button.setAttribute("aria-pressed", String(slotOf(arm) >= 0));
    (button.closest("tr") || button).style.setProperty("--c", `var(${variableOf(arm)})`);
    button.querySelector(".swatch").replaceChildren(keyOf(arm));
  }
}

/** How an arm is drawn in the charts, for a button: its point, and its line if it is chosen. */
function keyOf(arm) {
  const node = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const { path, dash } = styleOf(arm) || { path: styles[0].path, dash: null };
  const mark = standingOf(arm) === "collapsed" ? data.cross : path;
  const line = node("path", { class: "line", d: "M-14 0H14", "stroke-dasharray": dash === "solid" ? "none" : dash });
  return node(
    "svg",
    { class: "key", viewBox: dash ? "-14 -8 28 16" : "-8 -8 16 16" },
    ...(dash ? [line] : []),
    node("path", { class: `dot ${standingOf(arm)}`, transform: "scale(5)", d: mark }),
  );
}

function buildChooser() {
  byId("chooser").append(element("span", { class: "hint" }, `In colour (up to ${MOST}):`));
  arms.forEach(({ name }, arm) => {
    const title = [name, FATES[standingOf(arm)], arm === data.parent ? "the parent" : ""].filter(Boolean).join(", ");
    byId("chooser").append(
      element(
        "button",
        { type: "button", class: "chip", "data-arm": arm, title, onclick: () => toggle(arm) },
        element("span", { class: "swatch" }),
        element("span", { class: "name" }, name),
        ...(arm === data.parent ? [element("span", { class: "tag" }, "parent")] : []),
      ),
    );
  });
}

// --- the table ---------------------------------------------------------------------------------------------------------

const NUMBER = /^[<>≤≥]? ?([+\-−]?\d[\d,]*(\.\d+)?(e[+\-−]?\d+)?)/i;

/** What a column sorts by: the number that a cell begins with, where all begin with one, else its text. A cell with
    nothing to say is null; the parent's own difference is 0. */
function keysOf(texts) {
  const empty = (text) => text === "-" || text === "";
  const numbers = texts.map((text) => (text === "parent" ? ["", "0"] : NUMBER.exec(text)));
  if (texts.every((text, index) => empty(text) || numbers[index])) {
    return numbers.map((found) => (found ? Number(found[1].replace(/,/g, "").replace(/−/g, "-")) : null));
  }
  return texts.map((text) => (empty(text) ? null : text.toLowerCase()));
}

function buildTables() {
  const tables = [...document.querySelectorAll("table.arms")];
  for (const table of tables) {
    table.tHead.querySelectorAll("th").forEach((head, column) => {
      const title = head.dataset.title || "arm";
      head.replaceChildren(
        element(
          "button",
          { type: "button", "aria-label": `Sort by ${title}`, onclick: () => sort(table, head, column) },
          ...head.childNodes,
        ),
      );
    });
    for (const row of table.tBodies[0].rows) {
      const cell = row.cells[0];
      cell.replaceChildren(
        element(
          "button",
          { type: "button", "data-arm": row.dataset.arm, onclick: () => toggle(Number(row.dataset.arm)) },
          ...cell.childNodes,
        ),
      );
    }
  }

  /** Numbers start with the largest, texts with the first; a second click turns the order, a third undoes it. */
  function sort(table, head, column) {
    const rows = [...table.tBodies[0].rows];
    const values = column
      ? keysOf(rows.map((row) => row.cells[column].textContent.trim()))
      : rows.map((row) => arms[row.dataset.arm].name.toLowerCase());
    const orders = values.some((value) => typeof value === "string")
      ? ["ascending", "descending"]
      : ["descending", "ascending"];
    const wanted = orders[orders.indexOf(head.getAttribute("aria-sort")) + 1];
    tables.forEach((other) =>
      other.querySelectorAll("th[aria-sort]").forEach((old) => old.removeAttribute("aria-sort")),
    );
    if (wanted) head.setAttribute("aria-sort", wanted);
    const keys = new Map(rows.map((row, index) => [row.dataset.arm, wanted ? values[index] : Number(row.dataset.arm)]));
    const sign = wanted === "descending" ? -1 : 1;
    const compare = (a, b) => {
      const [one, other] = [keys.get(a.dataset.arm), keys.get(b.dataset.arm)];
      if (one === null || other === null) return (one === null) - (other === null);
      return sign * (one < other ? -1 : one > other ? 1 : 0);
    };
    for (const each of tables) each.tBodies[0].append(...[...each.tBodies[0].rows].sort(compare));
  }
}

// --- start -------------------------------------------------------------------------------------------------------------

function firstChoice() {
  const all = (standing) => arms.map((_, arm) => arm).filter((arm) => standingOf(arm) === standing);
  const brief = data.brief === null ? [] : [data.brief];
  const wanted = [...new Set([data.parent, ...brief, ...all("front"), ...all("noise")])];
  wanted.slice(0, FIRST).forEach((arm) => {
    slots[freeSlot(arm)] = arm;
  });
}

function watch() {
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const chart = charts.find((one) => one.node === entry.target);
        if (!entry.isIntersecting || chart.drawn) continue;
        chart.drawn = true;
        seen.unobserve(chart.node);
        draw(chart);
      }
    },
    { rootMargin: "400px" },
  );
  charts.forEach((chart) => seen.observe(chart.node));
  let timer = 0;
  addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => charts.filter((chart) => chart.width !== chart.node.clientWidth).forEach(draw), 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
  addEventListener("beforeprint", () => {
    printing = true;
    document.querySelectorAll("details").forEach((one) => {
      one.open = true;
    });
    charts.forEach(draw);
  });
  addEventListener("afterprint", () => {
    printing = false;
    charts.forEach(draw);
  });
}

function start() {
  firstChoice();
  buildChooser();
  buildTables();
  buildFilters();
  showChoice();
  showProblems();
  document.documentElement.classList.add("live"); // the sections show; the still picture goes when there is another
  addEventListener("DOMContentLoaded", watch); // plotly.js stands behind this script, so that the page is there before it
}
