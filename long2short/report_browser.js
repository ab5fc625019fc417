// The browser of problems: filters, list, and two answers side by side. See report.js.

// --- problem by problem ------------------------------------------------------------------------------------------------

const browser = {
  arms: [data.parent, data.brief ?? data.parent],
  samples: [0, 0],
  kind: "all",
  bin: "all",
  text: "",
  page: 0,
  problem: 0,
  list: [],
};
const sampleOf = (row, side) => row.samples[browser.arms[side]][browser.samples[side]];
const verdictOf = (row, side) => problems.verdicts[sampleOf(row, side)[0]];
const MARKS = { right: "✓", wrong: "✗", undecided: "?" };
let filters;

function kindOf(row) {
  const [left, right] = [verdictOf(row, 0), verdictOf(row, 1)];
  if (left === "undecided" || right === "undecided") return "undecided";
  if (left === right) return left === "right" ? "both right" : "both wrong";
  return left === "right" ? "only left" : "only right";
}

const searched = (row) =>
  [row.id, row.question, row.answer, sampleOf(row, 0)[3], sampleOf(row, 1)[3]].join("\n").toLowerCase();

function buildFilters() {
  const change = (name) => (event) => {
    browser[name] = event.target.value;
    browser.page = 0;
    showProblems(true);
  };
  let timer = 0;
  const search = element("input", {
    type: "search",
    placeholder: "Search questions and answers",
    "aria-label": "Search questions and answers",
    oninput: (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => change("text")(event), 120);
    },
  });
  const bins = element(
    "select",
    { "aria-label": "Difficulty", onchange: change("bin") },
    element("option", { value: "all" }, `any ${data.difficulty.by === "level" ? "level" : "difficulty"}`),
  );
  data.difficulty.labels.forEach((label, index) =>
    bins.append(element("option", { value: index }, data.difficulty.by === "level" ? `level ${label}` : label)),
  );
  filters = element("select", { "aria-label": "Who is right", onchange: change("kind") });
  byId("filters").append(search, filters, ...(data.difficulty.labels.length > 1 ? [bins] : []));
}

/** The list, and the problem at its head after a change of filters (`fresh`) or where the old one is no longer in it. */
function showProblems(fresh = false) {
  const names = browser.arms.map((arm) => arms[arm].name);
  if (names[0] === names[1])
    names.forEach((name, side) => {
      names[side] = `${name} #${browser.samples[side] + 1}`;
    });
  const wanted = browser.text.trim().toLowerCase();
  const rows = problems.rows
    .map((row, index) => ({ row, index, kind: kindOf(row) }))
    .filter(({ row }) => browser.bin === "all" || String(row.bin) === browser.bin)
    .filter(({ row }) => !wanted || searched(row).includes(wanted));
  const kinds = [
    ["all", "all"],
    ["both right", "both right"],
    ["only left", `only ${names[0]} right`],
    ["only right", `only ${names[1]} right`],
    ["both wrong", "both wrong"],
    ["undecided", "undecided"],
  ];
  filters.replaceChildren(
    ...kinds.map(([kind, said]) => {
      const number = kind === "all" ? rows.length : rows.filter((one) => one.kind === kind).length;
      const option = element("option", { value: kind }, `${said} (${number})`);
      option.selected = kind === browser.kind;
      return option;
    }),
  );
  browser.list = rows.filter((one) => browser.kind === "all" || one.kind === browser.kind).map((one) => one.index);
  if ((fresh || !browser.list.includes(browser.problem)) && browser.list.length) browser.problem = browser.list[0];
  browser.page = Math.max(0, Math.floor(browser.list.indexOf(browser.problem) / PAGE));
  showList();
  showProblem();
}

function showList() {
  const pages = Math.max(1, Math.ceil(browser.list.length / PAGE));
  const first = browser.page * PAGE;
  const list = element("ol", { "aria-label": "Problems" });
  for (const index of browser.list.slice(first, first + PAGE)) {
    const row = problems.rows[index];
    const marks = element(
      "span",
      { class: "marks" },
      ...[0, 1].map((side) => {
        const verdict = verdictOf(row, side);
        return element(
          "span",
          { class: `${verdict}-mark`, title: `${arms[browser.arms[side]].name}: ${verdict}` },
          MARKS[verdict],
        );
      }),
    );
    const level = row.level === null ? "" : ` · level ${row.level}`;
    const button = element(
      "button",
      { type: "button", "data-problem": index, onclick: () => open(index) },
      marks,
      element("span", { class: "line" }, clipped(row.question.replace(/\s+/g, " "), 90)),
      element("span", { class: "under" }, `${row.id}${level}`),
    );
    list.append(element("li", {}, button));
  }
  const turn = (by) => () => {
    browser.page += by;
    showList();
  };
  const back = element("button", { type: "button", "aria-label": "Earlier problems", onclick: turn(-1) }, "‹");
  const on = element("button", { type: "button", "aria-label": "Further problems", onclick: turn(1) }, "›");
  back.disabled = browser.page === 0;
  on.disabled = browser.page >= pages - 1;
  const said = browser.list.length
    ? `${first + 1} to ${Math.min(first + PAGE, browser.list.length)} of ${browser.list.length}`
    : "no problem is like this";
  byId("list").replaceChildren(list, element("div", { class: "pages" }, back, element("span", {}, said), on));
  markCurrent();
}

function markCurrent() {
  for (const button of document.querySelectorAll("#list button[data-problem]")) {
    if (Number(button.dataset.problem) === browser.problem) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function open(index) {
  browser.problem = index;
  const page = Math.floor(browser.list.indexOf(index) / PAGE);
  if (page !== browser.page) {
    browser.page = page;
    showList();
  }
  markCurrent();
  showProblem();
}

function showProblem() {
  if (!browser.list.length) {
    byId("problem").replaceChildren(element("p", { class: "empty" }, "No problem is like this. Loosen the filters."));
    return;
  }
  const row = problems.rows[browser.problem],
    at = browser.list.indexOf(browser.problem);
  const step = (by, label, sign) => {
    const button = element(
      "button",
      {
        type: "button",
        "aria-label": label,
        onclick: () => {
          open(browser.list[at + by]);
          byId("problem").querySelectorAll(".steps button")[by < 0 ? 0 : 1].focus();
        },
      },
      sign,
    );
    button.disabled = browser.list[at + by] === undefined;
    return button;
  };
  const level = row.level === null ? "" : ` · level ${row.level}`;
  byId("problem").replaceChildren(
    element(
      "div",
      { class: "head" },
      element("div", { class: "steps" }, step(-1, "Problem before", "‹ previous"), step(1, "Problem after", "next ›")),
      element("h3", {}, `${row.id}${level}`),
      element("div", { class: "question" }, row.question),
      element("p", { class: "reference" }, "reference ", element("bdi", {}, element("code", {}, row.answer))),
    ),
    element("div", { class: "answers" }, answer(row, 0), answer(row, 1)),
  );
}

function answer(row, side) {
  const other = sampleOf(row, 1 - side)[1];
  const [, tokens, end, text, reason] = sampleOf(row, side),
    verdict = verdictOf(row, side);
  const said = side === 0 ? "left" : "right";
  const choose = (kind) => (event) => {
    browser[kind][side] = Number(event.target.value);
    showProblems();
    byId("problem").querySelectorAll(".answers > div")[side].querySelector(`select[data-kind=${kind}]`).focus();
  };
  const options = (values, current) =>
    values.map((value, index) => {
      const option = element("option", { value: index }, value);
      option.selected = index === current;
      return option;
    });
  const pick = element(
    "div",
    { class: "pick" },
    element(
      "select",
      { "data-kind": "arms", "aria-label": `Arm on the ${said}`, onchange: choose("arms") },
      ...options(
        arms.map((arm) => arm.name),
        browser.arms[side],
      ),
    ),
    element(
      "select",
      { "data-kind": "samples", "aria-label": `Sample on the ${said}`, onchange: choose("samples") },
      ...options(
        row.samples[0].map((_, index) => `sample ${index + 1}`),
        browser.samples[side],
      ),
    ),
  );
  const against =
    side === 1 && other > 0
      ? ` (${tokens <= other ? "−" : "+"}${Math.abs(100 * (tokens / other - 1)).toFixed(0)}%)`
      : "";
  const verdictLine = element(
    "p",
    { class: "verdict" },
    element("b", { class: `${verdict}-mark` }, `${MARKS[verdict]} ${verdict}`),
    `${tokens.toLocaleString("en")} tokens${against}, ${problems.ends[end]}`,
  );
  const close = text.lastIndexOf("</think>");
  const thought = close < 0 ? "" : text.slice(0, close + 8);
  const shown = element(
    "pre",
    { tabindex: "0", "aria-label": `Answer on the ${said}` },
    element("span", { class: "thought" }, thought),
    text.slice(thought.length),
  );
  const rest = reason ? [element("p", { class: "quiet" }, reason)] : [];
  return element("div", {}, pick, verdictLine, shown, ...rest);
}
