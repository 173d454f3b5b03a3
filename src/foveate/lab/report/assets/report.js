"use strict";

for (const head of document.querySelectorAll("thead th")) {
  const column = [...head.parentNode.children].indexOf(head);
  head.querySelector("button").addEventListener("click", () => sortBy(head, column));
}

function sortBy(head, column) {
  const numeric = head.classList.contains("number");
  const first = numeric ? "descending" : "ascending";
  const direction = head.getAttribute("aria-sort") === first ? opposite(first) : first;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
  const body = head.closest("table").tBodies[0];
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.children[column].dataset.value;
  const order = numeric ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b));
  body.append(...[...body.rows].sort((a, b) => sign * order(a, b)));
}

function opposite(direction) {
  return direction === "ascending" ? "descending" : "ascending";
}

function number(element) {
  const marked = element.closest?.("[class*=' k'], [class^='k']");
  return marked && /(?:^| )(k\d+)(?: |$)/.exec(marked.getAttribute("class"))?.[1];
}

function lightUp(name) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  document.documentElement.classList.toggle("lighting", Boolean(name));
  if (name) for (const part of document.getElementsByClassName(name)) part.classList.add("lit");
}

document.addEventListener("pointerover", (event) => lightUp(number(event.target)));
document.documentElement.addEventListener("pointerleave", () => lightUp(null));
