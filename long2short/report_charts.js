// The charts of the page, by plotly.js: each is a function of the state and of the width it has. See report.js.

// --- charts --------------------------------------------------------------------------------------------------------

const charts = [];

/** A chart is drawn when it comes near the window for the first time, and again whenever the choice changes. */
function addChart(id, build, after = () => {}) {
  const node = byId(id);
  if (node) charts.push({ node, build, after, drawn: false, width: 0 });
}

function draw(chart) {
  if (!chart.drawn && !printing) return;
  const width = printing ? 960 : chart.node.clientWidth;
  if (!width) return;
  const { traces, layout } = chart.build(width);
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--muted") };
  const shared = {
    width,
    font,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    hovermode: "closest",
    hoverlabel: {
      bgcolor: colour("--panel"),
      bordercolor: colour("--rule"),
      align: "left",
      font: { ...font, color: colour("--ink") },
    },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  };
  Plotly.react(
    chart.node,
    traces,
    { ...shared, ...layout },
    { displayModeBar: false, showTips: false, doubleClick: chart.node.id === "frontier-chart" ? false : "reset" },
  );
  if (!chart.width) {
    chart.after(chart.node);
    if (chart.node.id === "frontier-chart") byId("still").remove();
  }
  chart.width = width;
}

function axis(changes) {
  return {
    gridcolor: colour("--grid"),
    zeroline: false,
    ticks: "",
    automargin: false,
    ...changes,
    title: { text: changes.title || "", standoff: 8, font: { size: 12.5 } },
  };
}

const margin = (width, changes) => ({ l: width < 500 ? 52 : 60, r: 22, t: 10, b: 46, ...changes });

// The frontier -------------------------------------------------------------------------------------------------------

function ranges() {
  const padded = (values, floor, ceiling) => {
    const low = Math.min(...values),
      high = Math.max(...values);
    const air = 0.06 * (high - low) || Math.max(Math.abs(high) * 0.05, 0.05);
    return [Math.max(low - air, floor), Math.min(high + air, ceiling)];
  };
  const x = padded(
    arms.flatMap((arm) => arm.tokens),
    0,
    Infinity,
  );
  const y = padded(
    arms.flatMap((arm) => arm.accuracy),
    0,
    1.005,
  );
  return { x: x[0] < 0.3 * x[1] ? [0, x[1]] : x, y };
}

function frontierChart(width) {
  const path = arms.filter((arm) => arm.standing === "front").sort((a, b) => a.tokens[0] - b.tokens[0]);
  const traces = [
    {
      x: path.map((arm) => arm.tokens[0]),
      y: path.map((arm) => arm.accuracy[0]),
      mode: "lines",
      hoverinfo: "skip",
      line: { color: colour("--front"), width: 1.5, dash: "dash" },
    },
  ];
  const bar = ([value, low, high], shade) => ({
    type: "data",
    symmetric: false,
    array: [high - value],
    arrayminus: [value - low],
    color: shade,
    thickness: 1.3,
    width: 0,
  });
  const strength = (arm) => (slotOf(arm) >= 0 ? 2 : 0) + (standingOf(arm) === "front" ? 1 : 0);
  const order = arms.map((_, arm) => arm).sort((a, b) => strength(a) - strength(b)); // the strong ones on top
  for (const arm of order) {
    const { name, tokens, accuracy, standing, hover } = arms[arm];
    const shade = colourOf(arm);
    const fate = FATES[standing] ? `  (${FATES[standing]})` : "";
    const rows = (width < 600 ? hover.slice(0, 5) : hover).map(
      ([head, text]) => `${plain(head)}  <b>${plain(text)}</b>`,
    );
    traces.push({
      x: [tokens[0]],
      y: [accuracy[0]],
      mode: "markers",
      customdata: [arm],
      hoverinfo: "text",
      hovertext: [`<b>${plain(name)}</b>${fate}<br>${rows.join("<br>")}`],
      error_x: bar(tokens, shade),
      error_y: bar(accuracy, shade),
      marker: {
        size: 11,
        symbol: standing === "collapsed" ? "x-thin" : symbolOf(arm),
        color: standing === "front" ? shade : colour("--paper"),
        line: { color: shade, width: 2 },
      },
    });
    if (arm === data.parent) {
      traces.push({
        x: [tokens[0]],
        y: [accuracy[0]],
        mode: "markers",
        hoverinfo: "skip",
        marker: { size: 22, symbol: "circle-open", color: colour("--ink"), line: { width: 1.5 } },
      });
    }
  }
  const height = width < 600 ? 380 : 520,
    edges = margin(width);
  const layout = {
    height,
    margin: edges,
    annotations: labels(width - edges.l - edges.r, height - edges.t - edges.b),
    xaxis: axis({ range: [...view.x], title: "mean tokens per completion" }),
    yaxis: axis({ range: [...view.y], title: "accuracy (avg@k)" }),
  };
  return { traces, layout };
}

/** Names beside their points so that they hide little; a name that finds no room is left to the hover text. */
function labels(width, height) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `600 12.5px ${getComputedStyle(document.body).fontFamily}`;
  const x = (value) => ((value - view.x[0]) / (view.x[1] - view.x[0])) * width;
  const y = (value) => (1 - (value - view.y[0]) / (view.y[1] - view.y[0])) * height;
  const overlap = (a, b) =>
    Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const soft = []; // points and error bars: better not hidden
  for (const { tokens: t, accuracy: a } of arms) {
    const middle = [x(t[0]), y(a[0])];
    soft.push([middle[0] - 8, middle[1] - 8, middle[0] + 8, middle[1] + 8]);
    soft.push(
      [x(t[1]) - 4, middle[1] - 4, x(t[2]) + 4, middle[1] + 4],
      [middle[0] - 4, y(a[2]) - 4, middle[0] + 4, y(a[1]) + 4],
    );
  }
  const path = arms
    .filter((arm) => arm.standing === "front")
    .map((arm) => [x(arm.tokens[0]), y(arm.accuracy[0])])
    .sort((a, b) => a[0] - b[0]);
  for (let index = 1; index < path.length; index++) {
    const [[x0, y0], [x1, y1]] = [path[index - 1], path[index]];
    const pieces = Math.min(200, Math.max(1, Math.round(Math.hypot(x1 - x0, y1 - y0) / 6)));
    for (let piece = 0; piece <= pieces; piece++) {
      const [middleX, middleY] = [x0 + ((x1 - x0) * piece) / pieces, y0 + ((y1 - y0) * piece) / pieces];
      soft.push([middleX - 2, middleY - 2, middleX + 2, middleY + 2]);
    }
  }
  const placed = [];
  const important = (arm) => arm === data.parent || slotOf(arm) >= 0 || ["front", "noise"].includes(standingOf(arm));
  const order = arms.map((_, arm) => arm).sort((a, b) => important(b) - important(a) || slotOf(b) - slotOf(a));
  const found = [];
  for (const arm of order) {
    const text = clipped(arms[arm].name, 28) + (standingOf(arm) === "collapsed" ? " (collapsed)" : "");
    const [spotX, spotY] = [x(arms[arm].tokens[0]), y(arms[arm].accuracy[0])];
    if (spotX < 0 || spotX > width || spotY < 0 || spotY > height) continue;
    const w = pen.measureText(text).width + 6,
      h = 17;
    let best = null;
    for (const distance of [9, 14, 20, 28, 40, 56]) {
      for (let step = 0; step < 16; step++) {
        const angle = (Math.PI / 8) * step;
        const middleX = spotX + Math.cos(angle) * (distance + w / 2),
          middleY = spotY + Math.sin(angle) * (distance + h / 2);
        const box = [middleX - w / 2, middleY - h / 2, middleX + w / 2, middleY + h / 2];
        if (
          box[0] < 0 ||
          box[1] < 0 ||
          box[2] > width ||
          box[3] > height ||
          placed.some((other) => overlap(box, other) > 0)
        )
          continue;
        const cost = (10 * soft.reduce((sum, other) => sum + overlap(box, other), 0)) / (w * h) + distance / 45;
        if (!best || cost < best.cost - 1e-9) best = { cost, box, middleX, middleY, distance };
      }
    }
    if (!best || (!important(arm) && best.cost > 2.5)) continue;
    placed.push(best.box);
    found.push({
      x: arms[arm].tokens[0],
      y: arms[arm].accuracy[0],
      ax: best.middleX - spotX,
      ay: best.middleY - spotY,
      text: plain(text),
      showarrow: true,
      arrowhead: 0,
      arrowwidth: 1,
      standoff: 8,
      borderpad: 0,
      arrowcolor: best.distance > 20 ? colour("--rule") : "rgba(0,0,0,0)",
      font: {
        size: 12.5,
        weight: arm === data.parent ? 700 : 400,
        color: important(arm) ? colour("--ink") : colour("--muted"),
      },
    });
  }
  return found;
}

addChart("frontier-chart", frontierChart, (node) => {
  const redraw = (range) => {
    view = range;
    draw(charts.find((chart) => chart.node === node));
  };
  node.on("plotly_click", (event) => {
    const arm = event.points[0].customdata;
    if (arm !== undefined) toggle(arm);
  });
  node.on("plotly_doubleclick", () => redraw(home));
  node.on("plotly_relayout", (change) => {
    if ("xaxis.range[0]" in change || "yaxis.range[0]" in change) {
      redraw({ x: [...node.layout.xaxis.range], y: [...node.layout.yaxis.range] });
    }
  });
});

// Lines: all arms, the chosen ones in colour, with dashes of their own, and on top ------------------------------------

function armLines(trace) {
  const order = [...arms.keys()].sort((a, b) => (slotOf(a) >= 0) - (slotOf(b) >= 0));
  return order.map((arm) => {
    const strong = slotOf(arm) >= 0;
    return {
      hoverinfo: "text",
      opacity: strong ? 1 : 0.55,
      line: strong
        ? { color: colourOf(arm), width: 2.2, dash: styleOf(arm).dash }
        : { color: colour("--grey"), width: 1, dash: "solid" },
      ...trace(arm, strong),
    };
  });
}

addChart("budget-chart", (width) => {
  const traces = armLines((arm) => ({
    x: data.budgets,
    y: arms[arm].budget,
    mode: "lines",
    hovertext: arms[arm].budget.map(
      (value, index) =>
        `<b>${plain(arms[arm].name)}</b><br>${percent(value)} right within ${data.budgets[index].toLocaleString("en")} tokens`,
    ),
  }));
  const ticks = [];
  const last = data.budgets[data.budgets.length - 1];
  for (let tick = 1; tick <= last; tick *= 2) if (tick >= data.budgets[0]) ticks.push(tick);
  return {
    traces,
    layout: {
      height: width < 600 ? 320 : 400,
      margin: margin(width),
      xaxis: axis({
        type: "log",
        title: "budget, tokens",
        tickvals: ticks,
        ticktext: ticks.map((tick) => tick.toLocaleString("en")),
        tickangle: 0,
      }),
      yaxis: axis({ title: "right within the budget", rangemode: "tozero" }),
    },
  };
});

addChart("difficulty-chart", (width) => {
  const { labels: names, counts, by } = data.difficulty;
  const narrow = width < 700;
  const shown = chosen();
  const at = (arm) =>
    shown.includes(arm) && shown.length > 1 ? (shown.indexOf(arm) / (shown.length - 1) - 0.5) * 0.3 : 0;
  const places = (arm) => names.map((_, index) => index + at(arm));
  const value = (arm, position) => arms[arm].bins.map((bin) => (bin ? bin[position] : null));
  const hover = (arm) =>
    arms[arm].bins.map((bin, index) => {
      if (!bin) return "";
      const [accuracy, low, high] = bin.map((value) => value.toFixed(3));
      const where = `${plain(by)}: ${plain(names[index])}, ${counts[index]} problems`;
      return `<b>${plain(arms[arm].name)}</b><br>${where}<br>accuracy ${accuracy} [${low}, ${high}]<br>${count(bin[3])} tokens`;
    });
  const marks = (arm, strong) => ({
    x: places(arm),
    mode: strong ? "lines+markers" : "lines",
    hovertext: hover(arm),
    marker: { size: 8, symbol: symbolOf(arm), color: colourOf(arm) },
  });
  const few = (index) => counts[index] < data.difficulty.few;
  const accuracy = armLines((arm, strong) => ({
    ...marks(arm, strong),
    y: value(arm, 0),
    error_y: strong
      ? {
          type: "data",
          symmetric: false,
          thickness: 1.2,
          width: 0,
          color: colourOf(arm),
          array: arms[arm].bins.map((bin) => (bin ? bin[2] - bin[0] : 0)),
          arrayminus: arms[arm].bins.map((bin) => (bin ? bin[0] - bin[1] : 0)),
        }
      : undefined,
  }));
  const tokens = armLines((arm, strong) => ({
    ...marks(arm, strong),
    x: names.map((_, index) => index),
    y: value(arm, 3),
    xaxis: "x2",
    yaxis: "y2",
  }));
  const ticks = {
    tickvals: names.map((_, index) => index),
    // A bin of few problems says how many: its bars are wide, and its tokens have none.
    ticktext: names.map((name, index) => {
      const text = plain(name).replace(/ (?=\S+$)/, "<br>");
      return few(index) ? `${text}<br><b>n = ${counts[index]}</b>` : text;
    }),
    range: [-0.4, names.length - 0.6],
    fixedrange: true,
    tickangle: 0,
    title: by === "level" ? "level" : "",
  };
  return {
    traces: [...accuracy, ...tokens],
    layout: {
      height: narrow ? 640 : 360,
      margin: margin(width, { b: names.some((_, index) => few(index)) ? 68 : 52 }),
      grid: narrow
        ? { rows: 2, columns: 1, pattern: "independent", ygap: 0.3 }
        : { rows: 1, columns: 2, pattern: "independent", xgap: 0.16 },
      xaxis: axis(ticks),
      yaxis: axis({ title: "accuracy", rangemode: "tozero" }),
      xaxis2: axis(ticks),
      yaxis2: axis({ title: "mean tokens", rangemode: "tozero" }),
    },
  };
});

addChart("lengths-chart", (width) => {
  const shown = chosen(),
    { edges } = data;
  const size = 96,
    gap = 30,
    top = 24,
    bottom = 46;
  const height = top + shown.length * size + (shown.length - 1) * gap + bottom,
    inner = height - top - bottom;
  const traces = [],
    shapes = [],
    annotations = [];
  const bins = edges.slice(1).map((_, index) => index);
  const place = (value) => {
    // in bins
    const index = Math.max(0, edges.findIndex((edge) => edge > value) - 1);
    return index + (value - edges[index]) / (edges[index + 1] - edges[index]) - 0.5;
  };
  const step = Math.max(1, Math.ceil(bins.length / (width < 600 ? 5 : 10)));
  const ticks = edges.map((_, index) => index).filter((index) => index % step === 0);
  const layout = {
    height,
    margin: margin(width, { l: 14, t: top, b: bottom }),
    barmode: "stack",
    bargap: 0.08,
    shapes,
    annotations,
    xaxis: axis({
      title: "tokens",
      tickvals: ticks.map((index) => index - 0.5),
      ticktext: ticks.map((index) => edges[index].toLocaleString("en")),
      range: [-0.7, bins.length - 0.3],
      anchor: `y${shown.length > 1 ? shown.length : ""}`,
      showgrid: false,
      fixedrange: true,
    }),
  };
  shown.forEach((arm, row) => {
    const { name, right, others, tokens, median } = arms[arm],
      key = row ? row + 1 : "";
    const from = 1 - (row * (size + gap) + size) / inner;
    layout[`yaxis${key}`] = axis({
      domain: [Math.max(0, from), Math.min(1, from + size / inner)],
      showticklabels: false,
      showgrid: false,
      zeroline: true,
      zerolinecolor: colour("--rule"),
      fixedrange: true,
    });
    const text = (index, number, what) => {
      const [from, to] = [edges[index], edges[index + 1] - 1].map((edge) => edge.toLocaleString("en"));
      return `<b>${plain(name)}</b><br>${number.toLocaleString("en")} ${what}, ${from} to ${to} tokens`;
    };
    const bar = (values, what, shade) => ({
      type: "bar",
      x: bins,
      y: values,
      yaxis: `y${key}`,
      hoverinfo: "text",
      hovertext: values.map((number, index) => text(index, number, what)),
      marker: { color: shade },
    });
    traces.push(bar(right, "right", colourOf(arm)), bar(others, "not right", colour("--grey")));
    shapes.push({
      type: "line",
      x0: place(median),
      x1: place(median),
      yref: `y${key} domain`,
      y0: 0,
      y1: 1,
      line: { color: colour("--ink"), width: 1.2, dash: "dot" },
    });
    annotations.push({
      xref: "paper",
      x: 0,
      xanchor: "left",
      yref: `y${key} domain`,
      y: 1,
      yanchor: "bottom",
      showarrow: false,
      font: { size: 12.5, color: colour("--ink") },
      text: `<b>${plain(clipped(name, 40))}</b>  median ${count(median)}, mean ${count(tokens[0])}`,
    });
  });
  return { traces, layout };
});

addChart("training-chart", (width) => {
  const { panels } = data,
    columns = width < 700 ? 1 : 2,
    rows = Math.ceil(panels.length / columns);
  const size = 230,
    gap = 64,
    top = 26,
    bottom = 44,
    height = top + rows * size + (rows - 1) * gap + bottom,
    inner = height - top - bottom;
  // A stage has the style of the first chosen arm that is a model of it.
  const armOf = (line) => line.arms.find((arm) => slotOf(arm) >= 0);
  const named = (line) =>
    [line.name, ...line.arms.map((arm) => arms[arm].name).filter((name) => name !== line.name)].map(plain).join(", ");
  const traces = [],
    layout = { height, margin: margin(width, { t: top, b: bottom }), annotations: [] };
  panels.forEach((panel, index) => {
    const key = index ? index + 1 : "",
      row = Math.floor(index / columns),
      column = index % columns;
    const from = 1 - (row * (size + gap) + size) / inner;
    const share = columns === 2 ? 0.455 : 1;
    layout[`xaxis${key}`] = axis({
      domain: [column * (1 - share), column * (1 - share) + share],
      anchor: `y${key}`,
      title: row === rows - 1 || index + columns >= panels.length ? "step" : "",
    });
    layout[`yaxis${key}`] = axis({
      domain: [Math.max(0, from), Math.min(1, from + size / inner)],
      anchor: `x${key}`,
      nticks: 6,
    });
    layout.annotations.push({
      xref: `x${key} domain`,
      x: 0,
      xanchor: "left",
      yref: `y${key} domain`,
      y: 1,
      yanchor: "bottom",
      yshift: 4,
      showarrow: false,
      text: `<b>${plain(panel.label)}</b>`,
      font: { size: 13, color: colour("--ink") },
    });
    const strong = (line) => armOf(line) !== undefined;
    for (const line of [...panel.lines].sort((a, b) => strong(a) - strong(b))) {
      const arm = armOf(line);
      const shade = strong(line) ? colourOf(arm) : colour(line.arms.length ? "--grey" : "--muted");
      traces.push({
        x: line.x,
        y: line.y,
        xaxis: `x${key}`,
        yaxis: `y${key}`,
        mode: line.x.length > 1 ? "lines" : "markers",
        hoverinfo: "text",
        hovertext: line.x.map((step, at) => `<b>${named(line)}</b><br>step ${step}: ${line.y[at]}`),
        line: {
          color: shade,
          width: strong(line) ? 2.2 : line.arms.length ? 1.8 : 1,
          dash: strong(line) ? styleOf(arm).dash : "solid",
        },
        marker: { size: 7, color: shade, symbol: strong(line) ? symbolOf(arm) : "circle" },
      });
    }
  });
  return { traces, layout };
});
