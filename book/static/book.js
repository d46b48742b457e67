/* Wide tables get a box that scrolls, each box that scrolls a tab stop, and each figure that is shown smaller than it is a link to it. */

const boxes = ".bd-article pre, .bd-article .table-box, .bd-article mjx-container[display], .bd-article dt.sig";

function mark() {
  for (const box of document.querySelectorAll(boxes)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

for (const table of document.querySelectorAll(".bd-article table")) {
  const box = document.createElement("div");
  box.className = "table-box";
  table.replaceWith(box);
  box.append(table);
}

function enlarge() {
  for (const image of document.querySelectorAll(".bd-article img")) {
    if (image.naturalWidth > 1.2 * image.clientWidth && image.clientWidth && !image.closest("a, .play")) {
      const link = document.createElement("a");
      link.href = image.getAttribute("src");
      link.title = "Open the figure at full size";
      image.replaceWith(link);
      link.append(image);
    }
  }
}

// names for what the theme leaves without one
for (const button of document.querySelectorAll(".search-button-field")) button.removeAttribute("aria-label");  // its text says it
for (const summary of document.querySelectorAll(".bd-sidebar-primary summary"))
  summary.ariaLabel = `Pages under ${summary.closest("li").querySelector("a").textContent}`;

addEventListener("load", enlarge);
const article = document.querySelector(".bd-article");
if (article) new ResizeObserver(mark).observe(article);  // the window, the side bars, or a formula that has been set
