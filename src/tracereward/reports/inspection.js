"use strict";
// Content of traces is set as text, never as markup. Traces are rendered in batches on scrolling, long ones on a click.
const BATCH = 24; // traces
const LONG = 1000; // tokens
const DIGITS = 4; // decimals of a token's value; step rewards have 2

const byId = (id) => document.getElementById(id);
const { limit, questions } = JSON.parse(byId("data").textContent);
const total = questions.reduce((sum, question) => sum + question.traces.length, 0);
const [list, count, more, readout] = ["questions", "count", "more", "readout"].map(byId);
questions.forEach((question, i) => { question.number = i + 1; question.search = question.prompt.toLowerCase(); });

let shown = []; // [question, its traces that pass the filters], in the selected order
let made = 0; // number of entries of `shown` on the page
let loaded = 0; // number of traces on the page

// --- numbers and elements ---

const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const signed = (value, digits) =>
  value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

// The report's colours: `--w` is the share of blue (hi) or orange (lo) in the mix with neutral.
function colour(element, reward) {
  element.classList.add(reward > 0 ? "hi" : "lo");
  element.style.setProperty("--w", `${(100 * Math.min(Math.abs(reward ?? 0) / limit, 1)).toFixed(2)}%`);
}

// --- one trace ---

// A trace's block follows the index; while the page loads it may not be there, or only its beginning.
function whenLoaded(trace, then) {
  const block = byId(`t${trace.id}`);
  if (block && (block.nextSibling || document.readyState !== "loading")) then(unpacked(JSON.parse(block.textContent)));
  else setTimeout(whenLoaded, 50, trace, then);
}

function unpacked({ text, values, kinds, steps }) {
  let at = 0;
  const piece = () => {
    const i = at++;
    if (kinds[i] === "-") return [text[i]];
    return [text[i], values[i] === null ? null : values[i] / 10 ** DIGITS, kinds[i] ?? ""];
  };
  return steps.map(([reward, count]) => ({ reward, tokens: Array.from({ length: count }, piece) }));
}

function token([text, reward, kinds]) {
  const span = make("span", ["t", ...kinds].join(" "), text);
  colour(span, reward);
  const blank = kinds.includes("e") ? "end of sequence" : kinds.includes("z") ? "part of a character"
    : /[mn]/.test(kinds) || text.includes("\n") ? "line break" : "space";
  const name = text.trim() || blank;
  span.setAttribute("role", "img");
  span.setAttribute("aria-label", `${name}: ${signed(reward, DIGITS)}${kinds.includes("s") ? ", supervised" : ""}`);
  span.tabIndex = -1;
  return span;
}

function stepRow(step, i, isError) {
  const row = make("tr", isError ? "error" : "");
  const number = make("th", "", String(i + 1));
  number.scope = "row";
  const text = make("td");
  text.dir = "auto";
  if (isError) {
    const mark = make("small", "", "suspected first error");
    mark.dir = "ltr"; // so that it does not affect the direction of the trace's text
    text.append(mark);
  }
  for (const piece of step.tokens) text.append(piece.length > 1 ? token(piece) : piece[0]);
  const chip = make("span", "chip", signed(step.reward, 2));
  colour(chip, step.reward);
  const reward = make("td");
  reward.append(chip);
  row.append(number, text, reward);
  return row;
}

function heatmap(trace, name) {
  const heat = make("div", "heat");
  heat.setAttribute("role", "group");
  heat.setAttribute("aria-label", `Token rewards of ${name}`);
  const fill = () => whenLoaded(trace, (steps) => fillHeatmap(heat, steps, trace.error));
  if (trace.tokens <= LONG) {
    fill();
    return heat;
  }
  const button = make("button", "open", `Show ${counted(trace.steps, "step")}, ${counted(trace.tokens, "token")}`);
  button.type = "button";
  button.addEventListener("click", () => {
    button.textContent = "Loading …";
    setTimeout(fill); // after this text is painted
  });
  heat.append(button);
  if (trace.error !== null) heat.append(make("span", "quiet", ` suspected first error: step ${trace.error + 1}`));
  return heat;
}

function fillHeatmap(heat, steps, error) {
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const title of ["#", "step", "reward"]) {
    const cell = make("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  table.createTBody().append(...steps.map((step, i) => stepRow(step, i, i === error)));
  const focused = heat.contains(document.activeElement);
  heat.replaceChildren(table);
  const first = heat.querySelector(".t");
  if (!first) return;
  first.tabIndex = 0; // the trace's one tab stop
  if (focused) first.focus({ preventScroll: true }); // the button that was pressed is gone
}

function candidate(trace, question) {
  const name = `candidate ${trace.number} of ${question.traces.length + question.not_shown}`;
  const facts = make("div", "facts");
  facts.append(make("h3", "", question.traces.length > 1 ? `#${trace.number}` : "Trace"));
  if (trace.correct !== null) facts.append(make("span", "verdict", trace.correct ? "✓ right" : "✗ wrong"));
  if (trace.answer !== null) facts.append(make("span", "", `answer ${trace.answer}`));
  facts.append(make("span", "", `reward ${signed(trace.reward, 2)}`));
  for (const [name, value] of Object.entries(trace.parts)) facts.append(make("span", "quiet", `${name} ${signed(value, 2)}`));
  if (trace.logprob !== null) facts.append(make("span", "quiet", `log-prob ${signed(trace.logprob, 2)}`));
  if (byId("order").value === "drop" && trace.drop !== null) facts.append(make("span", "quiet", `largest drop ${signed(trace.drop, 2)}`));
  if (trace.model !== null) facts.append(make("span", "quiet", trace.model));
  const article = make("article", "trace");
  article.setAttribute("aria-label", name);
  article.append(facts, heatmap(trace, name));
  return article;
}

function section([question, traces]) {
  const box = make("section", "question");
  const heading = make("h2", "", `Question ${question.number} of ${questions.length}`);
  heading.id = `question-${question.number}`;
  heading.tabIndex = -1;
  box.setAttribute("aria-labelledby", heading.id);
  const prompt = make("div", "prompt", question.prompt.trim());
  prompt.dir = "auto";
  box.append(heading, prompt);
  const facts = make("div", "facts quiet");
  if (question.answer !== null) facts.append(make("span", "", `right answer ${question.answer}`));
  const hidden = question.traces.length - traces.length;
  if (hidden) facts.append(make("span", "", `${counted(hidden, "candidate")} filtered out`));
  const candidates = make("div", "candidates");
  candidates.append(...traces.map((trace) => candidate(trace, question)));
  box.append(facts, candidates);
  return box;
}

// --- what is shown ---

const KEYS = { lowest: (t) => t.reward, highest: (t) => t.reward && -t.reward, drop: (t) => t.drop && -t.drop };

function select() {
  const words = byId("search").value.trim().toLowerCase();
  const answers = document.querySelector("[name=answers]:checked")?.value ?? "all";
  const passes = { all: () => true, wrong: (t) => t.correct === false, right: (t) => t.correct === true }[answers];
  shown = questions
    .filter((question) => question.search.includes(words))
    .map((question) => [question, question.traces.filter(passes)])
    .filter(([, traces]) => traces.length);
  const key = KEYS[byId("order").value];
  if (key) { // a question is sorted by its first candidate; missing values come last
    const at = (trace) => key(trace) ?? Infinity;
    for (const [, traces] of shown) traces.sort((a, b) => at(a) - at(b) || 0);
    shown.sort(([, a], [, b]) => at(a[0]) - at(b[0]) || 0);
  }
  list.replaceChildren();
  hideReadout();
  made = loaded = 0;
  const traces = shown.reduce((sum, [, held]) => sum + held.length, 0);
  count.textContent = `${traces.toLocaleString("en")} of ${counted(total, "trace")}, `
    + `${shown.length.toLocaleString("en")} of ${counted(questions.length, "question")}`;
  if (!traces) list.append(make("p", "message", total ? "No trace matches." : "There are no traces."));
  load();
}

function load() {
  const end = loaded + BATCH;
  while (made < shown.length && loaded < end) {
    list.append(section(shown[made]));
    loaded += shown[made][1].length;
    made += 1;
  }
  more.hidden = made === shown.length;
  byId("loaded").textContent = `The first ${counted(loaded, "trace")} are loaded; more load as you scroll.`;
  // Observing again triggers another callback: the end may still be in view.
  observer.unobserve(more);
  if (!more.hidden) observer.observe(more);
}

const observer = new IntersectionObserver((entries) => { if (entries.at(-1).isIntersecting) load(); },
  { rootMargin: "1000px" });
byId("load").addEventListener("click", load);

function changed() {
  select();
  if (list.getBoundingClientRect().top < 0) list.scrollIntoView(); // back to the start of the new list
}
byId("search").addEventListener("input", changed);
for (const control of document.querySelectorAll("#order, [name=answers]")) control.addEventListener("change", changed);
byId("tools").addEventListener("submit", (event) => event.preventDefault());

// --- a token's value, on hover or focus ---

let read = null;

function placeReadout() {
  if (!read) return;
  const at = read.getClientRects()[0];
  if (!at) return;
  const own = readout.getBoundingClientRect();
  const above = at.top - own.height - 6;
  readout.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - own.width - 8))}px`;
  readout.style.top = `${above < 0 ? at.bottom + 6 : above}px`;
}

function showReadout(event) {
  const target = event.target.closest?.(".t");
  if (!target) return;
  read = target;
  readout.textContent = target.getAttribute("aria-label");
  readout.hidden = false;
  placeReadout();
}

function hideReadout() {
  read = null;
  readout.hidden = true;
}

function leave() { // the pointer or the focus left a token; a focused token keeps showing its value
  hideReadout();
  showReadout({ target: document.activeElement });
}

for (const name of ["pointerover", "focusin"]) list.addEventListener(name, showReadout);
for (const name of ["pointerout", "focusout"]) list.addEventListener(name, leave);
document.addEventListener("scroll", placeReadout, { passive: true, capture: true });

// --- keys ---

function focusToken(from, to) {
  if (!to) return;
  for (const held of from.closest(".heat").querySelectorAll('[tabindex="0"]')) held.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

function nextToken(from, key) {
  const tokens = [...from.closest(".heat").querySelectorAll(".t")];
  const i = tokens.indexOf(from);
  const row = from.closest("tr");
  switch (key) {
    case "ArrowRight": return tokens[i + 1];
    case "ArrowLeft": return tokens[i - 1];
    case "ArrowDown": return row.nextElementSibling?.querySelector(".t");
    case "ArrowUp": return row.previousElementSibling?.querySelector(".t");
    case "Home": return tokens[0];
    case "End": return tokens.at(-1);
    default: return undefined;
  }
}

function goToQuestion(by) {
  const sections = [...list.querySelectorAll(".question")];
  let at = sections.indexOf(document.activeElement.closest(".question"));
  if (at < 0) { // no question has the focus: start from the one at the top of the window
    at = sections.findIndex((held) => held.getBoundingClientRect().bottom > 120);
    if (by > 0 && sections[at]?.getBoundingClientRect().top > 0) at -= 1;
  }
  if (at + by >= sections.length && made < shown.length) load();
  const heading = list.querySelectorAll(".question > h2")[at + by];
  if (!heading) return;
  heading.focus({ preventScroll: true });
  heading.scrollIntoView();
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("[type=search], select")) return;
  if (event.target.matches(".t") && /^(Arrow|Home|End)/.test(event.key)) {
    focusToken(event.target, nextToken(event.target, event.key));
  } else if (event.key === "j" || event.key === "k") {
    goToQuestion(event.key === "j" ? 1 : -1);
  } else if (event.key === "/") {
    byId("search").focus();
  } else if (event.key === "Escape") {
    hideReadout();
    return;
  } else {
    return;
  }
  event.preventDefault();
});
list.addEventListener("focusin", (event) => { // a tap or click also moves the tab stop
  if (event.target.matches(".t") && event.target.tabIndex !== 0) focusToken(event.target, event.target);
});

byId("tools").hidden = false;
select();
