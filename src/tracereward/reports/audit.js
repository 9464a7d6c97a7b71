"use strict";
// Content of demonstrations is set as text, never as markup.
const byId = (id) => document.getElementById(id);
const { name, limit, rows } = JSON.parse(byId("data").textContent);
const STORE = `tracereward audit ${name}`;
const MARKS = ["keep", "fix", "drop"];
const KEYS = { a: "keep", f: "fix", d: "drop" };

let marks = read(); // id -> {mark, note}
let at = 0; // index in rows
let told = ""; // of the last export or failure

function read() { // private windows may have no store
  try { return JSON.parse(localStorage.getItem(STORE)) ?? {}; } catch { return {}; }
}

function keep() {
  told = "";
  try { localStorage.setItem(STORE, JSON.stringify(marks)); } catch { told = "not kept by this browser: export before you leave"; }
}

const signed = (value) => value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

// --- one demonstration ---

function stepRow(step, i, lowest) {
  const row = make("tr", lowest ? "error" : "");
  const number = make("th", "", String(i + 1));
  number.scope = "row";
  const text = make("td");
  text.dir = "auto";
  if (lowest) text.append(make("small", "", "lowest step"));
  text.append(step.text);
  const reward = make("td");
  if (step.reward !== null) {
    const chip = make("span", `chip ${step.reward > 0 ? "hi" : "lo"}`, signed(step.reward));
    chip.style.setProperty("--w", `${(100 * Math.min(Math.abs(step.reward) / limit, 1)).toFixed(1)}%`);
    reward.append(chip);
  }
  row.append(number, text, reward, make("td", "quiet", step.log_prob === null ? "" : signed(step.log_prob)));
  return row;
}

function card(row) {
  const box = make("article");
  const place = make("div", "place");
  const heading = make("h2", "", `${at + 1} of ${rows.length}`);
  heading.tabIndex = -1;
  place.append(heading, make("span", "quiet", row.source));
  if (row.reward !== null) place.append(make("span", "", `reward ${signed(row.reward)}`));
  if (row.log_prob !== null) place.append(make("span", "quiet", `log-prob ${signed(row.log_prob)}`));
  if (row.answer !== null) place.append(make("span", "quiet", `answer ${row.answer}`));
  box.append(place);
  if (row.findings.length) {
    const list = make("ul", "findings");
    list.setAttribute("aria-label", "Findings");
    list.append(...row.findings.map((text) => make("li", "", text)));
    box.append(list);
  }
  const prompt = make("div", "prompt", row.question.trim());
  prompt.dir = "auto";
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const title of row.reward === null ? ["#", "step", "", ""] : ["#", "step", "reward", "log-prob"]) {
    const cell = make("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  table.createTBody().append(...row.steps.map((step, i) => stepRow(step, i, i === row.lowest)));
  const heat = make("div", "heat");
  heat.append(table);
  const note = make("label", "note", "Note");
  const field = make("textarea");
  field.id = "note";
  field.value = marks[row.id]?.note ?? "";
  field.addEventListener("input", () => { set(row, { note: field.value }); tell(); });
  note.append(field);
  box.append(prompt, heat, note);
  return box;
}

function set(row, change) {
  const value = { mark: null, note: "", ...marks[row.id], ...change };
  if (value.mark === null && !value.note) delete marks[row.id];
  else marks[row.id] = value;
  keep();
}

// --- where the reader is ---

const passes = {
  all: () => true,
  unmarked: (row) => !marks[row.id]?.mark,
  found: (row) => row.findings.length > 0,
  ...Object.fromEntries(MARKS.map((mark) => [mark, (row) => marks[row.id]?.mark === mark])),
};

function next(by) { // index of the next one that passes the filter; undefined if there is none
  const fits = passes[byId("show").value];
  for (let i = at + by; i >= 0 && i < rows.length; i += by) if (fits(rows[i])) return i;
  return undefined;
}

function go(to) {
  if (to !== undefined && to >= 0 && to < rows.length) {
    at = to;
    show();
    scrollTo(0, 0);
  } else {
    show();
  }
}

function tell() {
  const counts = MARKS.map((mark) => [mark, rows.filter((row) => marks[row.id]?.mark === mark).length]);
  const marked = counts.reduce((sum, [, count]) => sum + count, 0);
  byId("bar").setAttribute("aria-valuenow", marked);
  byId("bar").firstElementChild.style.width = `${rows.length ? (100 * marked) / rows.length : 0}%`;
  byId("status").textContent = told || `${marked} of ${rows.length} marked: ` + counts.map(([mark, count]) => `${count} ${mark}`).join(", ");
  for (const button of document.querySelectorAll("[data-mark]")) {
    button.setAttribute("aria-pressed", marks[rows[at]?.id]?.mark === button.dataset.mark);
  }
  byId("previous").disabled = next(-1) === undefined;
  byId("next").disabled = next(1) === undefined;
}

function show() {
  byId("card").replaceChildren(rows.length ? card(rows[at]) : make("p", "message", "There are no demonstrations."));
  tell();
}

function mark(value) {
  if (!rows.length) return;
  const row = rows[at];
  const to = next(1);
  set(row, { mark: value });
  go(value === null ? at : to);
}

// --- export: the file that --drop reads; rows with a right or wrong completion, as calibrate reads them ---

function exported() {
  return rows.filter((row) => marks[row.id]?.mark).map((row) => {
    const { mark, note } = marks[row.id];
    return `${JSON.stringify({ id: row.id, mark, note, correct: mark === "keep", source: row.source, ...row.export })}\n`;
  }).join("");
}

function save() {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([exported()], { type: "application/jsonl" }));
  link.download = "marks.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  const bare = rows.filter((row) => marks[row.id] && !marks[row.id].mark).length;
  told = `exported to marks.jsonl${bare ? `, without ${bare} that ${bare === 1 ? "has" : "have"} a note and no mark` : ""}`;
  tell();
}

// --- keys and buttons ---

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target.matches("textarea, input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const key = event.key;
  if (key in KEYS) mark(KEYS[key]);
  else if (key === "j" || key === "ArrowRight") go(next(1));
  else if (key === "k" || key === "ArrowLeft") go(next(-1));
  else if (key === "u") mark(null);
  else if (key === "n") byId("note")?.focus();
  else if (key === "g") byId("go").focus();
  else if (key === "e") save();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-mark]")) {
  button.addEventListener("click", () => mark(button.dataset.mark));
}
byId("previous").addEventListener("click", () => go(next(-1)));
byId("next").addEventListener("click", () => go(next(1)));
byId("export").addEventListener("click", save);
byId("show").addEventListener("change", () => {
  const fits = passes[byId("show").value];
  go(rows.length && !fits(rows[at]) ? next(1) ?? next(-1) : at);
  byId("show").blur();
});
byId("go").addEventListener("change", () => {
  go(Number(byId("go").value) - 1);
  byId("go").value = "";
  byId("go").blur();
});
byId("marks").addEventListener("submit", (event) => event.preventDefault());

byId("card").hidden = false;
byId("marks").hidden = false;
at = Math.max(0, rows.findIndex((row) => !marks[row.id]?.mark));
show();
