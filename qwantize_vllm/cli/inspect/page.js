"use strict";
const body = document.querySelector("#layers tbody");
const value = (row, column) => {
  const data = row.cells[column].dataset.v;
  return data === undefined || data === "" ? null : isNaN(data) ? data : Number(data);
};
for (const header of document.querySelectorAll("#layers th[data-column]")) {
  header.querySelector("button").addEventListener("click", () => {
    const column = Number(header.dataset.column);
    const text = header.dataset.text !== undefined;
    // Numbers the largest first, names from a to z; a second click turns it round.
    const before = header.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : !text;
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = text ? String(a).localeCompare(String(b), undefined, { numeric: true }) : a - b;
      return descending ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
    document.querySelectorAll("#layers th[aria-sort]").forEach((each) => each.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  });
}
document.querySelector("#filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const row of body.rows) row.hidden = !String(row.cells[0].dataset.v).toLowerCase().includes(wanted);
});
