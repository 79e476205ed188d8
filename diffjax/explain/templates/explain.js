// A slider and a button for each group of pictures. Without this script all pictures are shown.
for (const group of document.querySelectorAll(".slides")) {
  const frames = [...group.querySelectorAll(":scope > figure")];
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const id = `slider-${group.dataset.name.toLowerCase().replaceAll(" ", "-")}`;
  const label = Object.assign(document.createElement("label"), { htmlFor: id, textContent: group.dataset.name });
  const range = Object.assign(document.createElement("input"), {
    type: "range", id, min: 0, max: frames.length - 1, step: 1, value: group.dataset.start,
  });
  const shown = document.createElement("span");
  shown.className = "shown";
  shown.setAttribute("aria-hidden", "true"); // The slider's own value says the same.
  const button = Object.assign(document.createElement("button"), { type: "button" });
  let timer = null;

  function show(index) {
    frames.forEach((frame, i) => { frame.hidden = i !== index; });
    range.value = index;
    shown.textContent = frames[index].dataset.label;
    range.setAttribute("aria-valuetext", frames[index].dataset.label);
  }
  function name() {
    const what = still.matches ? "Next" : timer ? "Stop" : "Play";
    button.textContent = what;
    button.setAttribute("aria-label", `${what}: ${group.dataset.name}`);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    name();
  }
  function next() {
    show((Number(range.value) + 1) % frames.length);
    if (Number(range.value) === frames.length - 1) stop();
  }
  range.addEventListener("input", () => { stop(); show(Number(range.value)); });
  button.addEventListener("click", () => {
    if (still.matches) return next();
    if (timer) return stop();
    timer = setInterval(next, Number(group.dataset.pause));
    next();
    name();
  });
  still.addEventListener("change", stop);
  const controls = document.createElement("div");
  controls.className = "controls";
  controls.append(label, range, button, shown);
  group.prepend(controls);
  show(Number(range.value));
  name();
}
