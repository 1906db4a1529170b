// The page: what was measured, pictures to compare, charts, tables; all from the data that the page carries.

const page = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const count = value => value.toLocaleString("en");
const ORIGINAL = "original";

function words(value) {
  if (Number.isInteger(value)) return count(value);
  if (typeof value !== "object") return String(value);
  return (
    Object.entries(value)
      .map(([key, item]) => (Array.isArray(value) ? words(item) : `${key} ${words(item)}`))
      .join(", ") || "none"
  );
}

function facts(about) {
  const told = Object.entries(about).filter(([, value]) => value !== null);
  return told.flatMap(([key, value]) => [
    element("dt", {}, key),
    element("dd", {}, key === "command" || key === "commit" ? element("code", {}, words(value)) : words(value)),
  ]);
}

function table(lines, attributes = {}) {
  const [headings, ...rows] = lines;
  const kinds = headings.map((_, i) => (rows.every(row => /^[-+\d]/.test(row[i])) ? null : "words"));
  const cell = (text, i) => {
    const [, value, interval] = /^(\S+) (\[.*\])$/.exec(text) || [null, text, null];
    return element("td", {class: kinds[i + 1]}, value, ...(interval ? [element("small", {}, interval)] : []));
  };
  return element(
    "table",
    attributes,
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        ...headings.map((text, i) =>
          element("th", {scope: "col", class: kinds[i]}, text.replace(/ (?=[↑↓]$)/, "\u00a0")),
        ),
      ),
    ),
    element(
      "tbody",
      {},
      ...rows.map(([first, ...others]) => element("tr", {}, element("th", {scope: "row"}, first), ...others.map(cell))),
    ),
  );
}

function fill() {
  document.title = `DiffO: ${page.title}`;
  by("title").textContent = page.title;
  by("caution").textContent = page.caution;
  by("facts").append(...facts(page.about));
  by("made").append(
    `This page was made on ${page.date} by `,
    element("code", {}, page.command),
    ". It needs nothing but itself.",
  );
  for (const group of page.groups) by("curves").append(chartGroup(group));
  by("curves").hidden = !page.groups.length;
  for (const each of page.tables)
    by("tables").append(
      element(
        "div",
        {class: "table"},
        element("h3", {}, each.title),
        element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": each.title}, table(each.lines)),
        element(
          "details",
          {},
          element("summary", {}, "How it was measured"),
          element("dl", {class: "facts"}, ...facts(each.about)),
        ),
      ),
    );
  if (page.compared) compare(page.compared);
  for (const section of document.querySelectorAll("main > section:not([hidden])"))
    by("contents").append(element("a", {href: `#${section.id}`}, section.querySelector("h2").textContent));
}

function compare({first, rates, pictures}) {
  const codecs = [...new Set(pictures.flatMap(picture => Object.keys(picture.nearest)))];
  const label = codec => (codec === ORIGINAL ? "Original" : page.codecs[codec] || codec);
  const rival = codecs.find(codec => codec !== first) || ORIGINAL;
  const state = {picture: 0, rate: Math.floor((rates.length - 1) / 2), left: rival, right: first};
  by("first").textContent = first;
  by("rates").querySelector("legend").textContent = `Mean rate of ${first}, bits per pixel`;
  by("pictures").hidden = false;

  for (const side of ["left", "right"]) {
    by(side).append(...[ORIGINAL, ...codecs].map(codec => element("option", {value: codec}, label(codec))));
    by(side).addEventListener("change", event => {
      state[side] = event.target.value;
      update();
    });
  }
  by("swap").addEventListener("click", () => {
    [state.left, state.right] = [state.right, state.left];
    update();
  });
  rates.forEach((rate, index) =>
    by("rates").append(
      element(
        "label",
        {class: "rate"},
        element("input", {
          type: "radio",
          name: "rate",
          value: index,
          checked: index === state.rate,
          onchange: () => {
            state.rate = index;
            update();
          },
        }),
        element("span", {}, rate.toFixed(3)),
      ),
    ),
  );
  pictures.forEach((picture, index) =>
    by("film").append(
      element(
        "button",
        {
          type: "button",
          title: picture.picture,
          onclick: () => {
            state.picture = index;
            update();
          },
        },
        element("img", {
          src: picture.original.uri,
          alt: picture.picture,
          loading: "lazy",
          decoding: "async",
          width: Math.round((68 * picture.width) / picture.height),
          height: 68,
        }),
      ),
    ),
  );

  // The coded file of a codec at the chosen rate; null for the original, undefined where the codec has none.
  const fileOf = codec => {
    const picture = pictures[state.picture];
    return codec === ORIGINAL ? null : picture.files[picture.nearest[codec]?.[state.rate]];
  };

  // The data URI of a file, or of the original, as it is shown.
  async function pictureOf(file, picture) {
    if (!file?.halved) return (file || picture.original).uri;
    return (file.enlarged ??= enlarged(file.uri, picture.width, picture.height));
  }

  function update() {
    const picture = pictures[state.picture],
      aim = picture.aims[state.rate];
    const files = [state.left, state.right].map(fileOf);
    by("stage").style.width = `${Math.max(320, picture.width)}px`;
    by("stage").style.aspectRatio = `${picture.width} / ${picture.height}`;
    ["left", "right"].forEach((side, i) => {
      const file = files[i],
        codec = state[side],
        image = by(`${side}-picture`);
      by(side).value = codec;
      image.hidden = file === undefined;
      image.alt = `${picture.picture}, ${label(codec)}`;
      if (file !== undefined) pictureOf(file, picture).then(uri => fileOf(state[side]) === file && (image.src = uri));
      const size = file ? `${count(file.bytes)} bytes` : file === null ? "" : "no file of it";
      by(`${side}-badge`).replaceChildren(label(codec), element("span", {}, size));
    });
    [...by("film").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === state.picture)));
    by("sides").replaceChildren(table([["", label(state.left), label(state.right)]]));
    by("sides")
      .querySelector("tbody")
      .append(...rowsOf(files, picture, aim));
    move(parseFloat(stage.style.getPropertyValue("--at") || 50));
  }

  function rowsOf(files, picture, aim) {
    const told = (name, tell) => [
      name,
      files.map(file => (file === null ? tell(null) : file === undefined ? "no file of this picture" : tell(file))),
      [false, false],
    ];
    const rows = [
      told("file", file => (file ? `${count(file.bytes)} bytes${times(file.bytes / aim)}` : "uncompressed")),
      told("bits per pixel", file => (file ? file.bpp.toFixed(4) : "24")),
      told("setting", file => (file ? file.setting : "-")),
    ];
    for (const [name, score] of Object.entries(page.scores)) {
      const values = files.map(file => file?.scores[name]);
      if (values.every(value => value === undefined)) continue;
      const [a, b] = values,
        better = score.lower ? (x, y) => x < y : (x, y) => x > y;
      rows.push([
        score.heading,
        values.map(value => (value === undefined ? "-" : value.toFixed(score.decimals))),
        [better(a, b), better(b, a)],
      ]);
    }
    rows.push(told("in this page", file => (file ? file.told : picture.original.told)));
    return rows.map(([name, cells, won]) =>
      element(
        "tr",
        {},
        element("th", {scope: "row"}, name),
        ...cells.map((text, i) => element("td", {class: won[i] ? "better" : null}, text)),
      ),
    );
  }
  const times = ratio => (ratio > 1.1 || ratio < 0.9 ? `, ${ratio.toFixed(2)} times those of ${first}` : "");

  const slider = by("slider"),
    stage = by("stage");
  function move(position = slider.value) {
    slider.value = position; // in whole percents, unlike the divider under a pointer
    stage.style.setProperty("--at", `${position}%`);
    slider.setAttribute(
      "aria-valuetext",
      `${slider.value} % ${label(state.left)}, ${100 - slider.value} % ${label(state.right)}`,
    );
  }
  slider.addEventListener("input", () => move());
  const drag = event => {
    const box = stage.getBoundingClientRect();
    move(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
  };
  stage.addEventListener("pointerdown", event => {
    if (event.button) return;
    stage.setPointerCapture(event.pointerId);
    slider.focus({preventScroll: true, focusVisible: false});
    event.preventDefault(); // which would take the focus away again
    drag(event);
  });
  stage.addEventListener("pointermove", event => {
    if (stage.hasPointerCapture(event.pointerId)) drag(event);
  });
  update();
}

fill();
