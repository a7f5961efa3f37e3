"use strict";
// A cell's own number or text is in data-value, with all its digits.
const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
const compare = (one, other) => {
  const numbers = [Number(one), Number(other)];
  if (one === "" || other === "") return (one === "") - (other === "");
  return numbers.some(Number.isNaN) ? one.localeCompare(other) : numbers[0] - numbers[1];
};
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = column > 0;
      const order = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const next = order[(order.indexOf(heading.getAttribute("aria-sort") ?? "none") + 1) % 3];
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const sorted = next === "none" ? original : [...original].sort((one, other) => {
        const values = [valueOf(one, column), valueOf(other, column)];
        return values.includes("") ? compare(...values) : sign * compare(...values);
      });
      body.append(...sorted);
    });
  });
}
const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const asCsv = (table) => {
  const columns = [...table.tHead.rows[0].cells].map((cell, column) => ({
    name: cell.textContent.trim(), column, spread: [...table.tBodies[0].rows].some((row) => row.cells[column].dataset.spread),
  }));
  const head = columns.flatMap(({ name, spread }) => (spread ? [name, `${name} standard deviation`] : [name]));
  const lines = [...table.tBodies[0].rows].map((row) => columns.flatMap(({ column, spread }) =>
    (spread ? [valueOf(row, column), row.cells[column].dataset.spread ?? ""] : [valueOf(row, column)])));
  return [head, ...lines].map((line) => line.map(quoted).join(",")).join("\n") + "\n";
};
const put = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page opened from the disk may not have the clipboard's interface
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) throw new Error("the browser does not allow it");
  }
};
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const said = button.textContent;
    try {
      await put(asCsv(document.getElementById(button.dataset.table)));
      button.textContent = "Copied";
    } catch (error) {
      button.textContent = `Not copied: ${error.message}`;
    }
    setTimeout(() => { button.textContent = said; }, 2000);
  });
}
const boxes = [...document.querySelectorAll(".picture, .table, pre")];
const mark = () => boxes.forEach((box) => box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth));
addEventListener("load", mark);
addEventListener("resize", mark);
