"use strict";
// Server responses and user input are set as text, never as markup.
const byId = (id) => document.getElementById(id);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function heatmap(result, limit) {
  const trace = make("div", "trace");
  let [step, into] = [0, null];
  result.tokens.forEach((token, i) => {
    if (!into) {
      const suspected = step === result.suspected_error;
      into = suspected ? make("mark") : trace;
      if (suspected) {
        into.append(make("small", "", "suspected first error"));
        trace.append(into);
      }
    }
    const reward = result.token_rewards[i];
    const span = make("span", reward > 0 ? "hi" : "lo", token);
    span.style.setProperty("--a", String((0.75 * Math.min(Math.abs(reward) / limit, 1)).toFixed(3)));
    span.title = signed(reward);
    span.tabIndex = 0;
    span.setAttribute("aria-label", `${token} ${signed(reward)}`);
    into.append(span);
    if (result.step_ends[i]) [step, into] = [step + 1, null];
  });
  return trace;
}

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [status, ranking] = [byId("status"), byId("ranking")];
  ranking.replaceChildren();
  const candidates = byId("candidates").value.split(/^---\s*$/m).map((text) => text.trim()).filter(Boolean);
  if (!candidates.length) { status.textContent = "Enter at least one candidate."; return; }
  status.textContent = "Scoring …";
  const headers = { "content-type": "application/json" };
  if (byId("key").value) headers.authorization = `Bearer ${byId("key").value}`;
  const asked = byId("prompt").value;
  const prompt = byId("newline").checked && !asked.endsWith("\n") ? asked + "\n" : asked;
  try {
    const response = await fetch("/v1/score", { method: "POST", headers, body: JSON.stringify({ prompt, candidates }) });
    const body = await response.json();
    if (!response.ok) { status.textContent = body.error.message; return; }
    const results = body.results.sort((a, b) => b.reward - a.reward);
    const limit = Math.max(0.5, ...results.flatMap((r) => r.token_rewards.map(Math.abs)));
    for (const result of results) {
      const item = make("li");
      const probability = result.probability === undefined ? "" : `, correct with probability ${result.probability.toFixed(2)}`;
      item.append(make("strong", "", `reward ${signed(result.reward)}${probability}`), make("span", "", ` (candidate ${result.index + 1})`));
      item.append(heatmap(result, limit));
      ranking.append(item);
    }
    status.textContent = `${results.length} ranked, ${body.usage.total_tokens} tokens.`;
  } catch (error) {
    status.textContent = `The server did not respond: ${error.message}`;
  }
});
