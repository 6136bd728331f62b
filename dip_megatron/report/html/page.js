"use strict";
(async () => {
  const root = document.documentElement;
  const trouble = (text) => {
    const place = document.getElementById("trouble");
    place.textContent = text;
    place.hidden = false;
  };
  const unpack = async (id) => {
    const packed = await fetch("data:application/octet-stream;base64," + document.getElementById(id).textContent);
    return new Response(packed.body.pipeThrough(new DecompressionStream("gzip"))).text();
  };

  const choice = window.matchMedia("(prefers-color-scheme: dark)");
  const { palettes, parts } = JSON.parse(document.getElementById("colors").textContent);
  let painted = "light"; // the figures come in light
  const paint = () => {
    const theme = root.dataset.theme;
    if (!window.Bokeh || theme === painted) return;
    painted = theme;
    for (const document of Bokeh.documents)
      for (const model of document.all_models)
        for (const [property, color] of Object.entries(parts[model.type] ?? {}))
          if (model[property] !== null) model[property] = palettes[theme][color];
  };
  const button = document.getElementById("theme");
  const wear = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "light" : "dark";
    button.setAttribute("aria-pressed", String(dark));
    paint();
  };
  wear(choice.matches);
  choice.addEventListener("change", () => wear(choice.matches));
  button.addEventListener("click", () => wear(root.dataset.theme !== "dark"));

  try {
    const [library, figures] = await Promise.all([unpack("library"), unpack("figures")]);
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    const drawing = JSON.parse(figures);
    const places = { docid: "report", roots: drawing.places, root_ids: Object.keys(drawing.places) };
    await Bokeh.embed.embed_items({ report: drawing.document }, [places]);
    paint();
  } catch (error) {
    trouble(`The figures can't be drawn: ${error.message}. The page needs a browser of 2023 or later.`);
    throw error;
  }

  const range = () => {
    for (const document of Bokeh.documents) {
      const found = document.get_model_by_name("timeline");
      if (found) return found.x_range;
    }
    return null;
  };
  const shown = range();
  if (shown) {
    const whole = [shown.start, shown.end];
    const show = (start, end) => {
      const width = Math.min(end - start, whole[1] - whole[0]);
      const left = Math.min(Math.max(start, whole[0]), whole[1] - width);
      shown.setv({ start: left, end: left + width });
    };
    const moves = {
      "+": (w, m) => show(m - w / 4, m + w / 4), "=": (w, m) => show(m - w / 4, m + w / 4),
      "-": (w, m) => show(m - w, m + w), 0: () => show(...whole), Home: () => show(...whole),
      ArrowLeft: (w, m) => show(m - 0.7 * w, m + 0.3 * w), ArrowRight: (w, m) => show(m - 0.3 * w, m + 0.7 * w),
    };
    for (const place of document.querySelectorAll("[data-keys]"))
      place.addEventListener("keydown", (event) => {
        const move = moves[event.key];
        if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        move(shown.end - shown.start, (shown.start + shown.end) / 2);
      });
  }
  root.dataset.drawn = "yes";
})();
