for (const film of document.querySelectorAll(".film")) {
  const figures = [...film.querySelectorAll("figure")], slider = film.querySelector("input");
  const show = () => {
    figures.forEach((figure, index) => figure.classList.toggle("shown", index == slider.value));
    film.querySelector("output").textContent = slider.ariaValueText = figures[slider.value].textContent;
  };
  film.classList.add("slides");
  film.querySelector("label").hidden = false;
  slider.hidden = figures.length < 2;
  slider.addEventListener("input", show);
  show();
}
for (const svg of document.querySelectorAll("svg[data-last]")) {
  const chart = svg.parentElement, shown = chart.querySelectorAll("li b"), output = chart.querySelector("output");
  const lines = [...svg.querySelectorAll("polyline")].map(line => ({
    steps: line.dataset.steps.split(" ").map(text => +text.replaceAll(",", "")), values: line.dataset.values.split(" "),
  }));
  const read = event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * {{ frame.WIDTH }};
    const wanted = (place - {{ frame.LEFT }}) / {{ frame.RIGHT - frame.LEFT }} * svg.dataset.last;
    const nearest = lines.map(({steps}) => steps.reduce((best, step, index) => Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? index : best, 0));
    const step = lines[0].steps[nearest[0]];
    lines.forEach((line, index) => shown[index].textContent = line.values[nearest[index]]);
    output.textContent = `step ${step.toLocaleString("en")}`;
    svg.querySelector(".cursor").setAttribute("d", `M${ {{ frame.LEFT }} + {{ frame.RIGHT - frame.LEFT }} * step / svg.dataset.last} {{ frame.TOP }}V{{ frame.BOTTOM }}`);
  };
  const leave = () => {
    lines.forEach((line, index) => shown[index].textContent = line.values.at(-1));
    output.textContent = "";
    svg.querySelector(".cursor").setAttribute("d", "");
  };
  for (const kind of ["pointerdown", "pointermove"]) svg.addEventListener(kind, read);
  svg.addEventListener("pointerleave", leave);
}
