// Keys press the page's own buttons; a note that was started survives a reload.
const buttons = new Map([...document.querySelectorAll("button[data-key]")].map((b) => [b.dataset.key.toLowerCase(), b]));
const form = document.getElementById("judge");
const reason = document.getElementById("reason");
const note = document.querySelector("textarea[name=note]");
const draft = form ? `note-${form.dataset.item}` : "";
let sent = false;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "Enter" && event.target === reason) { // implicit submission would press the first button
    event.preventDefault();
    if (reason.value.trim()) buttons.get("s").click();
    return;
  }
  const typing = event.target.matches("input:not([type=radio]), textarea, select");
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing) return;
  if (event.key.toLowerCase() === "n" && note) {
    event.preventDefault();
    document.getElementById("more").open = true;
    note.focus();
    return;
  }
  if (event.key === "Enter" && event.target.matches("button, a, summary")) return; // it has a meaning of its own
  const button = buttons.get(event.key.toLowerCase());
  if (!button) return;
  event.preventDefault();
  if (button.value === "skip" && !reason.value.trim()) { reason.focus(); return; }
  button.click();
});

if (form) {
  form.addEventListener("submit", (event) => {
    if (sent) { event.preventDefault(); return; } // the key makes a second one harmless; this spares the wait
    if (event.submitter && event.submitter.value === "skip" && !reason.value.trim()) {
      event.preventDefault();
      reason.focus();
      return;
    }
    sent = true;
  });
  addEventListener("pageshow", () => { sent = false; });
}
if (note) {
  note.value = sessionStorage.getItem(draft) || "";
  if (note.value) document.getElementById("more").open = true;
  note.addEventListener("input", () => sessionStorage.setItem(draft, note.value));
}
