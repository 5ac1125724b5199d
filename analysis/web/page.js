// Draws every chart of the page, top to bottom. Expressions are interpreted, never compiled, so that
// the content policy needs no eval. document.documentElement.dataset.charts says how many were drawn.
(async () => {
  const axis = {
    labelColor: "var(--ink)", titleColor: "var(--ink)", gridColor: "var(--line)",
    domainColor: "var(--line)", tickColor: "var(--line)", titleFontWeight: "normal",
  };
  const config = {
    background: null, font: "system-ui, sans-serif", axis,
    legend: { labelColor: "var(--ink)", titleColor: "var(--ink)", symbolStrokeWidth: 2 },
    view: { stroke: null }, text: { color: "var(--ink)" },
  };
  const options = { renderer: "svg", ast: true, actions: false, defaultStyle: false, mode: "vega-lite", config };
  let drawn = 0;
  for (const { name, spec, names, rows } of JSON.parse(document.getElementById("charts").textContent)) {
    const values = rows.map((row) => Object.fromEntries(names.map((key, i) => [key, row[i]])));
    const place = document.getElementById(`chart-${name}`);
    await vegaEmbed(place, { ...spec, data: { values } }, options);
    place.querySelector("svg").setAttribute("aria-hidden", "true"); // its place says it in words
    drawn += 1;
  }
  document.documentElement.dataset.charts = String(drawn);
})();
