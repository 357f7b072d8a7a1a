// The index of the search, the largest file of a page, is fetched when the search is first used and not with the page.
{
  const begun = new Promise((begin) => {
    addEventListener("focusin", (event) => event.target.closest?.("[data-md-component=search]") && begin());
    addEventListener("change", (event) => event.target.id === "__search" && begin()); // the button on a narrow screen
  });
  const { open, send } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (method, address, ...rest) {
    this.late = String(address).endsWith("/search/search_index.json");
    return open.call(this, method, address, ...rest);
  };
  XMLHttpRequest.prototype.send = function (...body) {
    if (this.late) begun.then(() => send.apply(this, body));
    else send.apply(this, body);
  };
}
