"use strict";
// Shows values on hover and by arrow keys, and saves a figure. The page is complete without it.
const marksOf = (figure) => [...figure.querySelectorAll(".mark")];

function choose(figure, mark) {
  for (const other of figure.querySelectorAll(".mark.chosen")) other.classList.remove("chosen");
  if (mark) mark.classList.add("chosen");
  figure.querySelector(".reading").textContent = mark ? mark.dataset.text : "";
}

function step(figure, by) {
  const marks = marksOf(figure);
  if (!marks.length) return;
  const at = marks.findIndex((mark) => mark.classList.contains("chosen"));
  const next = at < 0 ? (by > 0 ? 0 : marks.length - 1) : (at + by + marks.length) % marks.length;
  choose(figure, marks[next]);
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A copy that needs no style sheet: each element takes the colours it has on this page.
function standalone(figure) {
  const original = figure.querySelector("svg");
  const copy = original.cloneNode(true);
  const from = [original, ...original.querySelectorAll("*")];
  const to = [copy, ...copy.querySelectorAll("*")];
  from.forEach((element, index) => {
    const style = getComputedStyle(element);
    for (const key of ["fill", "stroke", "stroke-width", "stroke-dasharray", "fill-opacity", "font"])
      if (style.getPropertyValue(key)) to[index].style.setProperty(key, style.getPropertyValue(key));
  });
  const [, , width, height] = original.getAttribute("viewBox").split(" ");
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.style.background = getComputedStyle(document.body).backgroundColor;
  return new XMLSerializer().serializeToString(copy);
}

function savePng(figure, key) {
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = image.width * 2;
    canvas.height = image.height * 2;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(`${key}.png`, blob));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(figure))}`;
}

function saveCsv(figure, key) {
  const quote = (cell) => `"${cell.textContent.replaceAll('"', '""')}"`;
  const rows = [...figure.querySelectorAll("table tr")];
  save(`${key}.csv`, new Blob([rows.map((row) => [...row.cells].map(quote).join(",")).join("\r\n")], { type: "text/csv" }));
}

for (const figure of document.querySelectorAll("figure")) {
  const chart = figure.querySelector("svg");
  const key = chart.dataset.key;
  chart.setAttribute("tabindex", "0");
  figure.querySelector(".actions").hidden = false;
  chart.addEventListener("mouseover", (event) => choose(figure, event.target.closest(".mark")));
  chart.addEventListener("mouseleave", () => choose(figure, null));
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (by) step(figure, by);
    else if (event.key === "Escape") choose(figure, null);
    else return;
    event.preventDefault();
  });
  figure.querySelector("[data-save=svg]").addEventListener("click", () =>
    save(`${key}.svg`, new Blob([standalone(figure)], { type: "image/svg+xml" })));
  figure.querySelector("[data-save=png]").addEventListener("click", () => savePng(figure, key));
  figure.querySelector("[data-save=csv]").addEventListener("click", () => saveCsv(figure, key));
}
