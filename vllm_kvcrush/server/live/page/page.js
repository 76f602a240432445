
"use strict";
(() => {
  const NAMES = {
    whole: "not compacted", tail: "raw tails", raw: "kept raw", exact: "kept exact",
    int8: "int8", int4: "int4", tc4: "tc4", tc6: "tc6", tc8: "tc8",
    tada: "tada", gear: "gear",
    cached: "prefix cache, free", free: "free",
  };
  const ORDER = Object.keys(NAMES);
  // As a request's slots lie: the compressed region, then the tail.
  const HELD = [...ORDER.slice(2, -2), "tail", "whole"];
  const SECONDS = 300, EVENTS = 64, NEWS_EVERY = 60000;
  const PUT_OFF = { shared: "put off: others hold its blocks too", no_room: "put off: no room for new blocks" };
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);
  const reduced = matchMedia("(prefers-reduced-motion: reduce)");

  // -- small helpers ---------------------------------------------------------------------------

  const make = (tag, cls, text) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const draw = (parent, tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const percent = (share) => `${share > 0 && share < 0.01 ? "<1" : Math.round(100 * share)} %`;
  const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  const bytes = (n) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
    return `${n >= 100 || unit === 0 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
  };
  const ago = (s) => s < 60 ? `${Math.max(0, Math.round(s))} s` : s < 3600 ? `${Math.floor(s / 60)} min` : `${Math.floor(s / 3600)} h`;
  const clock = (t) => new Date(1000 * t).toLocaleTimeString();
  const budget = (b) => b <= 1 ? percent(b) : `${b.toLocaleString("en")} tokens`;
  const sum = (list, of) => list.reduce((total, item) => total + of(item), 0);

  // -- connection ------------------------------------------------------------------------------

  let key = "", paused = false, stream = null, retry = 0, timer = 0;
  let past = new Map(), last = null, lastNews = 0;

  const say = (text, how = "") => { $("connection").className = how; put($("said"), text); };

  async function connect() {
    clearTimeout(timer);
    if (stream || paused || document.hidden) return;
    const own = stream = new AbortController();
    let wait = Math.min(30, 2 ** retry);
    try {
      const headers = key ? { Authorization: `Bearer ${key}` } : {};
      const answer = await fetch("kvcrush/events", { headers, signal: own.signal, cache: "no-store" })
        .catch(() => { throw new Error("The server cannot be reached."); });
      if (answer.status === 401) return asked();
      if (!answer.ok) {
        const body = await answer.json().catch(() => ({}));
        throw new Error(body?.error?.message || `The server answered ${answer.status}.`);
      }
      $("ask").hidden = true;
      past = new Map();
      await read(answer.body.getReader());
    } catch (error) {
      if (own.signal.aborted) return;
      retry += 1;
      say(`${error.message} Next try in ${wait} s.`, "lost");
      timer = setTimeout(connect, 1000 * wait);
    } finally {
      if (stream === own) stream = null;
    }
  }

  function disconnect() {
    clearTimeout(timer);
    if (stream) stream.abort();
    stream = null;
  }

  function asked() {
    $("refused").textContent = key ? "The server refused that key." : "";
    key = "";
    say("Waiting for a key", "lost");
    $("ask").hidden = false;
    $("key").focus();
  }

  async function read(reader) {
    const decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read().catch(() => ({ done: true }));
      if (done) throw new Error("The server closed the stream.");
      text += decoder.decode(value, { stream: true });
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const lines = text.slice(0, end).split("\n");
        text = text.slice(end + 2);
        const data = lines.filter((l) => l.startsWith("data: ")).map((l) => l.slice(6)).join("\n");
        if (data) { retry = 0; take(JSON.parse(data)); }
      }
    }
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    $("key").value = "";
    retry = 0;
    connect();
  });
  $("pause").addEventListener("click", () => {
    paused = !paused;
    $("pause").setAttribute("aria-pressed", String(paused));
    if (paused) { disconnect(); say("Paused"); } else { say("Connecting"); connect(); }
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));

  // -- state -----------------------------------------------------------------------------------

  function take(state) {
    for (const engine of state.engines) {
      const own = past.get(engine.engine) || { history: [], events: new Map() };
      const from = engine.time - SECONDS;
      own.history.push(...engine.pressure.history);
      if (!engine.stale) own.history.push([engine.time, engine.pressure.now]);
      own.history = own.history.filter((s) => s[0] >= from).sort((a, b) => a[0] - b[0]);
      for (const event of engine.compactions.recent) own.events.set(event.seq, event);
      const old = [...own.events.keys()].sort((a, b) => b - a).slice(EVENTS);
      for (const seq of old) own.events.delete(seq);
      past.set(engine.engine, own);
    }
    last = state;
    requestAnimationFrame(render);
  }

  function render() {
    const state = last;
    put($("about"), `${state.model} · ${state.policy === "none" ? "compresses only what asks" : `${state.policy}, budget ${budget(state.budget)}`}`);
    const old = state.silent.length ? ` · no answer from engine ${state.silent.join(", ")}` : "";
    say(`Live${old}`, old ? "lost" : "live");
    put($("clock"), clock(state.time));
    totals(state.engines);
    const seen = new Set();
    for (const engine of state.engines) {
      const id = `engine-${engine.engine}`;
      seen.add(id);
      show($(id) || add(id), engine, state);
    }
    for (const node of [...$("engines").children]) if (!seen.has(node.id)) node.remove();
    news(state);
  }

  function add(id) {
    const node = $("engine").content.firstElementChild.cloneNode(true);
    node.id = id;
    const heading = node.querySelector("h2");
    heading.id = `${id}-name`;
    node.setAttribute("aria-labelledby", heading.id);
    node.querySelector(".scroll").setAttribute("aria-label", `Last compactions of ${id.replace("-", " ")}`);
    $("engines").append(node);
    return node;
  }

  function totals(engines) {
    $("totals").hidden = false;
    const requests = engines.flatMap((e) => e.requests);
    const held = sum(requests, (r) => r.bytes_held), raw = sum(requests, (r) => r.bytes_raw);
    const blocks = sum(engines, (e) => e.pool.blocks);
    const free = sum(engines, (e) => e.pool.counts.free + e.pool.counts.cached);
    const by = (reason) => sum(engines, (e) => e.compactions.total[reason] || 0);
    put($("held"), bytes(held));
    put($("raw"), raw ? `of ${bytes(raw)} uncompressed: ${percent(held / raw)}` : "nothing runs");
    put($("running"), String(sum(engines, (e) => e.running)));
    put($("waiting"), `running, ${sum(engines, (e) => e.waiting)} waiting`);
    put($("used"), percent((blocks - free) / blocks));
    put($("blocks"), `${(blocks - free).toLocaleString("en")} of ${count(blocks, "block")}`);
    put($("compacted"), (by("budget") + by("pressure")).toLocaleString("en"));
    put($("reasons"), `${by("budget").toLocaleString("en")} for budgets, ${by("pressure").toLocaleString("en")} for pressure`);
  }

  function news(state) {
    if (Date.now() - lastNews < NEWS_EVERY) return;
    lastNews = Date.now();
    put($("news"), `${$("running").textContent} ${$("waiting").textContent}; pool in use ${$("used").textContent}; KV held ${$("held").textContent} ${$("raw").textContent}; ${count(Number($("compacted").textContent.replace(/\D/g, "")), "compaction")} so far.`);
  }

  // -- one engine ------------------------------------------------------------------------------

  function show(node, engine, state) {
    put(node.querySelector("h2"), state.engines.length > 1 ? `Engine ${engine.engine}` : "Engine");
    node.querySelector("h2").classList.toggle("unseen", state.engines.length === 1);
    const stale = node.querySelector(".stale");
    stale.hidden = !engine.stale;
    if (engine.stale) put(stale, `This engine has not answered since ${clock(engine.time)}: it shows what it held then.`);
    map(node.querySelector(".pool"), engine.pool);
    chart(node.querySelector(".chart"), engine, past.get(engine.engine), state.time);
    events(node.querySelector(".pressure"), past.get(engine.engine).events, state.time);
    requests(node.querySelector(".running"), engine);
  }

  // Cells as one path for each state: filled squares are in use, hollow ones are hits of the prefix
  // cache, dots are free.
  function map(node, pool) {
    const svg = node.querySelector(".map");
    const width = Math.max(200, svg.clientWidth || 400);
    const cells = sum(pool.map, (run) => run[1]);
    const size = Math.max(5, Math.min(18, Math.floor(Math.sqrt((width * 210) / cells))));
    const columns = Math.floor(width / size), rows = Math.ceil(cells / columns), gap = size > 8 ? 2 : 1;
    const paths = Object.fromEntries(ORDER.map((state) => [state, []]));
    let at = 0;
    for (const [state, length] of pool.map) {
      for (const end = at + length; at < end; at += 1) {
        const x = (at % columns) * size, y = Math.floor(at / columns) * size, side = size - gap;
        if (state === "free") { const c = side / 2 - 1; paths.free.push(`M${x + c} ${y + c}h2v2h-2z`); }
        else if (state === "cached") paths.cached.push(`M${x + 1} ${y + 1}h${side - 2}v${side - 2}h-${side - 2}z`);
        else (paths[state] || paths.whole).push(`M${x} ${y}h${side}v${side}h-${side}z`);
      }
    }
    svg.setAttribute("viewBox", `0 0 ${width} ${rows * size}`);
    svg.style.height = `${rows * size}px`;
    for (const state of ORDER) {
      const path = svg.querySelector(`.${state}-fill`) || draw(svg, "path", { class: `${state}-fill` });
      path.setAttribute("d", paths[state].join(""));
    }
    const shown = ORDER.filter((s) => pool.counts[s] || s === "free" || s === "cached" || s === "whole");
    svg.setAttribute("aria-label", `Map of ${count(pool.blocks, "block")}: ${shown.map((s) => `${pool.counts[s]} ${NAMES[s]}`).join(", ")}`);
    const each = pool.cell_blocks > 1 ? `; a cell is ${pool.cell_blocks}, in the colour of most` : "";
    put(node.querySelector("h3 .quiet"), `${count(pool.blocks, "block")} of ${pool.block_size} tokens, ${bytes(pool.block_bytes)} each${each}`);
    const body = node.querySelector("tbody");
    rowsOf(body, shown, (s) => s, (state) => {
      const row = make("tr"), name = make("td");
      const swatch = draw(name, "svg", { class: "swatch", viewBox: "0 0 12 12", "aria-hidden": "true" });
      const shape = { free: "M5 5h2v2h-2z", cached: "M1 1h10v10h-10z" }[state] || "M0 0h12v12h-12z";
      draw(swatch, "path", { class: `${state}-fill`, d: shape });
      name.append(NAMES[state]);
      row.append(name, make("td", "n"), make("td", "n"), make("td", "n"));
      return row;
    }, (row, state) => {
      const n = pool.counts[state] || 0;
      row.classList.toggle("empty", !n);
      put(row.cells[1], n.toLocaleString("en"));
      put(row.cells[2], bytes(n * pool.block_bytes));
      put(row.cells[3], percent(n / pool.blocks));
    });
  }

  // Keeps a row for each item, in their order, so that nothing is drawn anew and focus stays.
  function rowsOf(body, items, name, create, update) {
    const known = new Map([...body.children].map((row) => [row.dataset.name, row]));
    let before = null;
    for (const item of items) {
      const id = String(name(item));
      let row = known.get(id);
      if (!row) { row = create(item); row.dataset.name = id; }
      known.delete(id);
      const place = before ? before.nextSibling : body.firstChild;
      if (row !== place) body.insertBefore(row, place);
      update(row, item);
      before = row;
    }
    for (const row of known.values()) row.remove();
  }

  function chart(svg, engine, own, now) {
    const width = Math.max(240, svg.clientWidth || 480), height = 150;
    const left = 44, right = 46, top = 10, bottom = 22;
    const highest = Math.max(1, ...own.history.map((s) => s[1]));
    const most = highest > 1 ? Math.ceil(highest * 4) / 4 : 1;
    const x = (t) => left + (width - left - right) * Math.min(1, Math.max(0, 1 - (now - t) / SECONDS));
    const y = (v) => top + (height - top - bottom) * (1 - v / most);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    svg.replaceChildren();
    for (const v of [0, 0.5, 1]) {
      draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) });
      draw(svg, "text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, percent(v));
    }
    for (const minutes of width < 420 ? [4, 2, 0] : [5, 4, 3, 2, 1, 0]) {
      const at = x(now - 60 * minutes);
      draw(svg, "text", { x: at, y: height - 4, "text-anchor": minutes === 5 ? "start" : "middle" }, minutes ? `−${minutes} min` : "now");
    }
    const points = [];
    for (const [t, v] of own.history) {
      const [px, py] = [x(t).toFixed(1), y(v).toFixed(1)];
      points.push(points.length ? `H${px}V${py}` : `M${px} ${py}`);
    }
    if (points.length) {
      const line = `${points.join("")}H${x(now).toFixed(1)}`;
      draw(svg, "path", { class: "area", d: `${line}V${y(0)}H${x(own.history[0][0]).toFixed(1)}z` });
      draw(svg, "path", { class: "line", d: line });
    }
    for (const event of own.events.values()) {
      if (now - event.time > SECONDS) continue;
      draw(svg, "line", { class: "tick", x1: x(event.time), x2: x(event.time), y1: y(0), y2: y(0) - (event.reason === "pressure" ? 12 : 6) });
    }
    const current = engine.pressure.now, limit = engine.pressure.limit;
    if (limit !== null) {
      draw(svg, "line", { class: "limit", x1: left, x2: width - right, y1: y(limit), y2: y(limit) });
      const near = Math.abs(y(limit) - y(current)) < 14;
      draw(svg, "text", { class: "limit-label", x: left + 4, y: y(limit) - 4 }, `limit ${percent(limit)}${near ? "" : ", compacts above"}`);
    }
    draw(svg, "circle", { class: "end", cx: x(now), cy: y(current), r: 3 });
    draw(svg, "text", { class: "now", x: x(now) + 7, y: y(current) + 4 }, percent(current));
    const peak = Math.max(current, ...own.history.map((s) => s[1]));
    svg.setAttribute("aria-label", `Pressure over five minutes: now ${percent(current)}, highest ${percent(peak)}${limit === null ? "" : `, limit ${percent(limit)}`}; ticks are compactions.`);
  }

  function events(node, known, now) {
    const list = [...known.values()].sort((a, b) => b.seq - a.seq);
    node.querySelector(".events").hidden = !list.length;
    node.querySelector(".none").hidden = Boolean(list.length);
    const body = node.querySelector(".events tbody"), first = !body.children.length;
    rowsOf(body, list, (e) => e.seq, () => {
      const row = make("tr", first || reduced.matches ? "" : "new");
      for (let i = 0; i < 6; i += 1) row.append(make("td"));
      return row;
    }, (row, event) => {
      const texts = [
        ago(now - event.time), `#${event.request}`, event.reason,
        `${event.blocks_before} → ${event.blocks_after}`,
        event.tokens_evicted === null ? "…" : event.tokens_evicted ? count(event.tokens_evicted, "token") : "nothing",
        event.seconds === null ? "…" : `${(1000 * event.seconds).toFixed(event.seconds < 0.01 ? 1 : 0)} ms`,
      ];
      texts.forEach((text, i) => put(row.cells[i], text));
    });
  }

  function requests(node, engine) {
    const list = engine.requests, most = Math.max(1, ...list.map((r) => Math.max(r.bytes_raw, r.bytes_held)));
    node.querySelector(".requests").hidden = !list.length;
    node.querySelector(".none").hidden = Boolean(list.length);
    const left = engine.running - list.length;
    put(node.querySelector("h3 .quiet"), list.length ? `the mark on a bar is the budget${left > 0 ? `; ${left} more that hold less are not shown` : ""}` : "");
    rowsOf(node.querySelector("tbody"), list, (r) => r.number, blank, (row, r) => fill(row, r, most));
  }

  function blank() {
    const row = make("tr");
    row.setAttribute("role", "row");
    for (let i = 0; i < 5; i += 1) {
      const cell = make("td");
      cell.setAttribute("role", "cell");
      row.append(cell);
    }
    const bar = make("span", "bar");
    bar.setAttribute("aria-hidden", "true");
    bar.append(make("span"), make("em"));
    row.cells[0].append(make("b"), make("small"));
    row.cells[1].append(bar, make("small"));
    row.cells[2].className = "policy";
    row.cells[3].append(make("span"));
    row.cells[4].append(make("span"), make("small"));
    return row;
  }

  function fill(row, r, most) {
    const [who, bar, policy, allowed, done] = row.cells;
    put(who.firstChild, `#${r.number}`);
    put(who.lastChild, `${r.phase === "prefill" ? `prefill, ${r.tokens_raw.toLocaleString("en")} of ${r.prompt_tokens.toLocaleString("en")}` : count(r.tokens_raw, "token")}, ${ago(r.seconds)}`);
    const track = bar.firstChild, whole = Math.max(r.bytes_raw, r.bytes_held, 1);
    track.style.width = `${(100 * whole) / most}%`;
    const [held, mark] = track.children;
    held.style.width = `${(100 * r.bytes_held) / whole}%`;
    const parts = HELD.filter((s) => r.blocks[s]);
    while (held.children.length > parts.length) held.lastChild.remove();
    parts.forEach((state, i) => {
      const part = held.children[i] || held.appendChild(make("i"));
      part.className = `${state}-fill`;
      part.style.flex = `${r.blocks[state]} 0 0`;
    });
    const share = r.budget <= 1 ? r.budget : r.budget / Math.max(1, r.tokens_raw);
    mark.hidden = r.reason === null || share >= 1;
    mark.style.left = `${(100 * Math.min(1, share) * r.bytes_raw) / whole}%`;
    const names = parts.map((s) => `${r.blocks[s]} ${{ whole: "whole", tail: "raw tail", raw: "raw" }[s] || s}`);
    put(bar.lastChild, `${bytes(r.bytes_held)} of ${bytes(r.bytes_raw)} (${percent(r.bytes_raw ? r.bytes_held / r.bytes_raw : 1)}) · ${names.join(" + ")} · ${r.tokens_held.toLocaleString("en")} of ${count(r.tokens_raw, "token")}`);
    put(policy, r.reason === null ? "none" : r.policy);
    put(allowed.firstChild, r.reason === null ? "whole" : budget(r.budget));
    const what = r.compactions ? `${r.compactions} ×, for ${r.reason === "pressure" ? "pressure" : "its budget"}` : r.reason === "pressure" ? "only under pressure" : r.reason === null ? "never" : "not yet";
    put(done.firstChild, what);
    const more = [];
    if (r.level) more.push(`step ${r.level} of ${r.levels}`);
    if (r.put_off) more.push(PUT_OFF[r.put_off]);
    if (r.policy_failures) more.push(`the policy failed ${r.policy_failures} ×`);
    put(done.lastChild, more.join("; "));
    done.lastChild.classList.toggle("warn", Boolean(r.put_off || r.policy_failures));
  }

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width && last) { width = innerWidth; requestAnimationFrame(render); }
  });
  connect();
})();
