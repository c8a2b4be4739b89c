(function () {
  "use strict";
  const root = document.documentElement;
  const steps = Array.from(document.querySelectorAll(".step"));
  if (!steps.length) return;
  const panel = document.querySelector(".panel");
  const everything = document.querySelector("[data-all]");
  let now = 0;

  function mark(selector, name) {
    document.querySelectorAll(selector).forEach(function (element) {
      const chosen = Number(element.dataset[name]) === now;
      element.classList.toggle("now", chosen);
      if (name === "step") {
        element.tabIndex = chosen ? 0 : -1;
        if (chosen) element.setAttribute("aria-current", "step"); else element.removeAttribute("aria-current");
      }
    });
  }

  function choose(number, from) {
    now = Math.min(Math.max(number, 1), steps.length);
    mark("[data-step]", "step");
    mark("[data-of]", "of");
    steps.forEach(function (step, at) {
      step.classList.toggle("now", at + 1 === now);
      step.open = at + 1 === now;
    });
    document.querySelectorAll(".cursor").forEach(function (cursor) {
      cursor.removeAttribute("hidden");
      cursor.setAttribute("x", String(now - 1));
    });
    document.querySelector(".where").textContent = now + " of " + steps.length;
    if (!from) return;
    history.replaceState(null, "", "#s" + now);
    const box = panel.getBoundingClientRect();
    const hidden = box.top > window.innerHeight * 0.75 || box.bottom < 60;
    if (from === "pointer" && hidden) panel.scrollIntoView({ block: "nearest" });
    if (root.classList.contains("all")) steps[now - 1].scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("click", function (event) {
    const token = event.target.closest("a[data-step]");
    const plot = event.target.closest("svg[data-steps]");
    const button = event.target.closest("button");
    const summary = event.target.closest("summary");
    if (token) {
      event.preventDefault();
      choose(Number(token.dataset.step), "pointer");
    } else if (plot) {
      const box = plot.getBoundingClientRect();
      choose(1 + Math.floor(((event.clientX - box.left) / box.width) * steps.length), "pointer");
    } else if (button && button.dataset.go) {
      choose(now + Number(button.dataset.go), "key");
    } else if (button) {
      const all = root.classList.toggle("all");
      everything.setAttribute("aria-pressed", String(all));
    } else if (summary && !root.classList.contains("all")) {
      event.preventDefault();
    }
  });

  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const goal = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 1, End: steps.length }[event.key];
    const inText = document.activeElement.matches("a[data-step]");
    const isPaging = event.key === "Home" || event.key === "End";
    if (goal === undefined || (isPaging && !inText)) return;
    event.preventDefault();
    choose(goal, "key");
    if (inText) document.activeElement.closest(".flow").querySelector('[data-step="' + now + '"]').focus();
  });

  root.classList.add("js");
  // one open step at a time is the script's work here; the browser's own would close what "all" shows
  steps.forEach(function (step) { step.removeAttribute("name"); });
  const asked = Number((location.hash.match(/^#s(\d+)$/) || [])[1]);
  const first = steps.findIndex(function (step) { return step.dataset.first !== undefined; });
  choose(asked || first + 1 || 1, null);
})();
