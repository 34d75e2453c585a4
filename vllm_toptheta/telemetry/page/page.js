
// Drawing, asking, pointer and keyboard.

const POLL_MS = 2000;
const TIMEOUT_MS = 10000;
const KEY = "toptheta-api-key";
// cividis: every step lighter than the one before, also to eyes that do not tell red from green
const RAMP = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

const $ = (id) => document.getElementById(id);
let drawnFor = null; // geometry that the maps were built for

/* ---- drawing ---- */

function colour(value) {
  const place = Math.min(1, Math.max(0, value)) * (RAMP.length - 1);
  const low = Math.min(RAMP.length - 2, Math.floor(place));
  return `color-mix(in srgb, ${RAMP[low + 1]} ${100 * (place - low)}%, ${RAMP[low]})`;
}

/** A round number that is not below `value` and not far above, at most 1. */
function niceCeiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return Math.min(1, [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.9999) * power);
}

function element(parent, name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  parent.append(made);
  return made;
}

function buildMap(map, stats) {
  map.replaceChildren();
  map.style.gridTemplateColumns = `max-content repeat(${stats.num_layers}, minmax(0, 1fr))`;
  const labelled = [1, 5, 10, 20].find((step) => stats.num_layers / step <= 40) ?? 50;
  const top = element(map, "div", { role: "row" });
  element(top, "span", { role: "rowheader" }, "layer");
  for (let layer = 0; layer < stats.num_layers; layer++) {
    const words = { role: "columnheader", "aria-label": `layer ${layer}`, ...(layer % 5 ? {} : { "data-fifth": "" }) };
    element(top, "span", words, layer % labelled ? "" : String(layer));
  }
  for (let head = 0; head < stats.num_kv_heads; head++) {
    const row = element(map, "div", { role: "row" });
    element(row, "span", { role: "rowheader" }, `kv head ${head}`);
    for (let layer = 0; layer < stats.num_layers; layer++) {
      element(row, "div", { role: "gridcell", tabindex: layer || head ? "-1" : "0", "data-layer": layer, "data-head": head });
    }
  }
}

function drawMap(map, legend, stats, values, which, words) {
  const known = [...values.values()].map((cell) => cell[which]).filter((value) => value !== null);
  const limit = niceCeiling(Math.max(0, ...known));
  const dense = new Set(stats.dense_layers);
  for (const cell of map.querySelectorAll("[role=gridcell]")) {
    const { layer, head } = cell.dataset;
    const one = values.get(`${layer},${head}`);
    const value = one ? one[which] : null;
    const isDense = dense.has(Number(layer));
    cell.classList.toggle("dense", isDense);
    cell.style.backgroundColor = value === null || isDense ? "" : colour(value / limit);
    const figures = isDense ? "a dense layer, reads everything"
      : value === null ? "no tokens yet"
      : `${percent(value)} ${words}`;
    cell.dataset.tip = `layer ${layer}, kv head ${head}\n${figures}` + (one && value !== null ? `\n${grouped.format(one.tokens)} sparse tokens` : "");
    cell.setAttribute("aria-label", cell.dataset.tip.replaceAll("\n", ", "));
  }
  legend.replaceChildren();
  element(legend, "span", {}, "0 %");
  element(legend, "span", { class: "ramp" }).style.background = `linear-gradient(to right, ${RAMP.join(", ")})`;
  element(legend, "span", {}, percent(limit));
  if (dense.size) {
    element(legend, "span", { class: "swatch dense" });
    element(legend, "span", {}, "dense layer: reads everything");
  }
}

function drawSpread(stats, { counts, pairs }) {
  const largest = Math.max(1, ...counts);
  const list = $("spread");
  if (list.children.length !== counts.length) {
    list.replaceChildren();
    for (const edge of stats.lost_mass_edges) {
      const item = element(list, "li");
      element(item, "span", { class: "share" });
      element(item, "span", { class: "bar" });
      element(item, "span", {}, `${coarse.format(100 * edge)} %`);
    }
  }
  counts.forEach((count, i) => {
    const [share, bar] = list.children[i].children;
    share.textContent = count ? `${(100 * count / pairs).toFixed(count / pairs < 0.1 ? 1 : 0)} %` : "";
    bar.style.height = `${100 * count / largest}px`;
  });
}

function drawTrend() {
  const newest = answers[answers.length - 1];
  const points = answers.slice(1).map((stats, i) => [stats.collected_at, perSecond(stats, answers[i], (one) => one.decode_tokens)]);
  const highest = Math.max(1, ...points.map(([, rate]) => rate));
  const place = ([at, rate]) => `${(120 * (1 - (newest.collected_at - at) / TREND_SECONDS)).toFixed(1)},${(23 - 22 * rate / highest).toFixed(1)}`;
  $("trend").firstElementChild.setAttribute("points", points.map(place).join(" "));
  $("trend").setAttribute("aria-label", `Tokens per second over two minutes, at most ${significant.format(highest)}`);
}

function describeGuard(stats) {
  const lowered = stats.guarded.filter((state) => state.lowered_by !== 0);
  if (stats.guard === "off") return stats.guard;
  const alarmed = stats.guarded.filter((state) => state.alarms).map((state) => state.layer);
  if (!lowered.length && stats.guard === "warn" && alarmed.length) return `warn: too much lost in layers ${alarmed.join(", ")}`;
  const bounds = new Set(stats.guarded.map((state) => state.max_lost_mass));
  const bound = bounds.size > 1 ? "its own bound" : percent([...bounds][0] ?? stats.max_lost_mass);
  if (!lowered.length) return `${stats.guard}: every layer within ${bound}`;
  const text = (state) => `${state.layer} (${state.lowered_by === null ? "dense" : "-" + state.lowered_by})`;
  return `${stats.guard}: thresholds lowered in layers ${lowered.map(text).join(", ")}`;
}

function describeDense(stats) {
  const sequence = `${grouped.format(stats.min_context)} tokens of context`;
  return stats.min_step_tokens ? `${sequence}, or ${grouped.format(stats.min_step_tokens)} in all requests` : sequence;
}

function describePromise(promised) {
  if (promised === null) return "nothing";
  const text = promised.text.replace("promised: ", "");
  return promised.differences.length ? `${text}; measured otherwise: ${promised.differences.join("; ")}` : text;
}

function describeBeyond({ layers, is_alarming, max_share }) {
  if (!layers.length) return "no window of tokens yet";
  const share = layers.reduce((sum, one) => sum + one.share, 0) / layers.length;
  const text = `${percent(share)} of tokens lose more than 1 % did when measured`;
  return is_alarming ? `alarm, above ${percent(max_share)}: ${text}` : text;
}

function describeDrafts({ draft_tokens, drafts }) {
  const text = `${draft_tokens} tokens at a time, verified by dense attention`;
  if (!drafts?.drafted) return text;
  const tokens = drafts.tokens_per_verification.toFixed(1);
  return `${text}: ${percent(drafts.accepted / drafts.drafted)} accepted, ${tokens} tokens a verification`;
}

function drawInForce(stats) {
  const rows = {
    "thresholds of": stats.thresholds ?? "none: every layer is dense",
    "target": stats.target ?? "–",
    "promised": describePromise(stats.promised),
    ...(stats.beyond_evidence && { "beyond the evidence": describeBeyond(stats.beyond_evidence) }),
    ...(stats.draft_tokens && { "drafts": describeDrafts(stats) }),
    "compensation": stats.compensation,
    "calibrated": stats.calibrated_lengths ? stats.calibrated_lengths.map((n) => grouped.format(n)).join(" to ") + " tokens" : "–",
    "dense up to": describeDense(stats),
    "dense layers": stats.dense_layers.join(", ") || "none",
    "guard": describeGuard(stats),
    "mode": stats.mode,
  };
  $("in-force").replaceChildren();
  for (const [name, value] of Object.entries(rows)) {
    element($("in-force"), "dt", {}, name);
    element($("in-force"), "dd", {}, value);
  }
}

function draw() {
  const stats = answers[answers.length - 1];
  const geometry = `${stats.num_layers} ${stats.num_kv_heads}`;
  if (drawnFor !== geometry) {
    buildMap($("rows-map"), stats);
    buildMap($("lost-map"), stats);
    drawnFor = geometry;
  }
  const recent = before(RATE_SECONDS);
  const tokensRate = perSecond(stats, recent, (one) => one.decode_tokens);
  const since = document.querySelector("[name=window]:checked").value === "start" ? nothing(stats) : before(MINUTE);
  const lost = spread(stats, since);
  const denseTokens = total(stats.dense_tokens);

  $("model").textContent = stats.thresholds ? `with the thresholds of ${stats.thresholds}` : "without thresholds";
  $("rows-share").textContent = percent(stats.rows_read_share);
  const keys = stats.keys_read_share === null ? "" : `; of keys ${percent(stats.keys_read_share)}`;
  const copies = stats.copies_read_share === null ? "" : `; copies of ${percent(stats.copies_read_share)}`;
  const cached = compact.format(sum(stats.layers, (head) => head.rows_cached));
  $("rows-note").textContent = `of ${cached} cached, in sparse layers${keys}${copies}`;
  $("tokens-rate").textContent = significant.format(tokensRate);
  $("bytes-rate").textContent = bytes(perSecond(stats, recent, (one) => one.bytes_not_read));
  $("bytes-note").textContent = `${bytes(stats.bytes_not_read)} since the start`;
  $("lost-mean").textContent = percent(lost.mean);
  $("dense-share").textContent = percent(stats.decode_tokens ? denseTokens / stats.decode_tokens : null);
  $("dense-note").textContent = `of ${compact.format(stats.decode_tokens)} decoded, in short contexts`;
  drawTrend();
  const values = cells(stats, since);
  drawMap($("rows-map"), $("rows-legend"), stats, values, "rows", "of value rows read");
  drawMap($("lost-map"), $("lost-legend"), stats, values, "lost", "of the softmax lost");
  drawSpread(stats, lost);
  drawInForce(stats);
  return tokensRate;
}

/* ---- asking ---- */

function show(state, words, notice = "") {
  $("state").dataset.state = state;
  if ($("state").textContent !== words) $("state").textContent = words; // a reader speaks only what changes
  $("notice").textContent = notice;
  $("notice").hidden = !notice;
  $("content").toggleAttribute("data-stale", state === "gone");
}

function remember(stats) {
  const newest = answers[answers.length - 1];
  if (newest && stats.decode_steps < newest.decode_steps) answers.length = 0; // the server has started anew
  if (newest && answers.length && stats.collected_at === newest.collected_at) return;
  answers.push(stats);
  while (stats.collected_at - answers[0].collected_at > TREND_SECONDS) answers.shift();
}

async function ask() {
  const key = sessionStorage.getItem(KEY);
  let answer, body;
  try {
    answer = await fetch("toptheta/stats", {
      headers: key ? { Authorization: `Bearer ${key}` } : {},
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    body = await answer.json();
  } catch {
    const last = answers[answers.length - 1];
    const known = last ? ` The figures are those of ${new Date(1000 * last.collected_at).toLocaleTimeString()}.` : "";
    show("gone", "No answer", `The server does not answer; this page keeps asking.${known}`);
    return;
  }
  const needsKey = answer.status === 401;
  if (needsKey && $("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  $("key-form").hidden = !needsKey;
  if (needsKey) {
    show("locked", "Locked", key ? "The server does not know this key." : "");
    $("content").hidden = true;
  } else if (!answer.ok) {
    show("gone", "No figures", `The server says: ${body.detail ?? answer.statusText}`);
  } else {
    remember(body);
    $("content").hidden = false;
    const rate = draw();
    const hint = body.thresholds === null ? "There are no thresholds for this model: every layer is dense."
      : `No token has been decoded yet. Decoding is dense up to ${describeDense(body)}, so ask something long.`;
    show(rate > 0 ? "live" : "idle", rate > 0 ? "Decoding" : "Idle", body.decode_tokens && body.thresholds !== null ? "" : hint);
  }
}

async function keepAsking() {
  if (!document.hidden) await ask();
  setTimeout(keepAsking, POLL_MS);
}

/* ---- pointer and keyboard ---- */

function showTip(cell) {
  const tip = $("tooltip");
  tip.hidden = !cell;
  if (!cell) return;
  tip.textContent = cell.dataset.tip;
  const box = cell.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8))}px`;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

for (const map of document.querySelectorAll(".map")) {
  const cellOf = (event) => event.target.closest("[role=gridcell]");
  map.addEventListener("pointerover", (event) => showTip(cellOf(event)));
  map.addEventListener("pointerleave", () => showTip(null));
  map.addEventListener("focusin", (event) => showTip(cellOf(event)));
  map.addEventListener("focusout", () => showTip(null));
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") showTip(null);
    const cell = cellOf(event);
    const step = STEPS[event.key];
    if (!cell || !step) return;
    event.preventDefault();
    const [layer, head] = [Number(cell.dataset.layer) + step[0], Number(cell.dataset.head) + step[1]];
    const next = map.querySelector(`[data-layer="${layer}"][data-head="${head}"]`);
    if (!next) return;
    cell.tabIndex = -1; // one stop of the Tab key for the whole map
    next.tabIndex = 0;
    next.focus();
  });
}

$("window").addEventListener("change", () => { if (answers.length) draw(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  ask();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
keepAsking();
