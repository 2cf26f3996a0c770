// A browser starts no worker from a folder (file://), and the search is one. There a frame does its work instead.
// In place of the script that MkDocs Material would fetch from another host.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.setAttribute("aria-hidden", "true");
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      const page = inside.document;
      page.open();
      page.write("<!doctype html><title>search</title><body></body>");
      page.close();
      const tell = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        this.onmessage?.(event);
      };
      const within = this.frame.contentWindow;
      within.postMessage = (data) => setTimeout(tell, 0, data);
      within.importScripts = () => {
        throw new Error("no further scripts");
      };
      this.ready = new Promise((done) => {
        const script = within.document.createElement("script");
        script.src = new URL(address, location.href).href;
        script.onload = done;
        within.document.body.append(script);
      });
      this.within = within;
    }
    postMessage(data) {
      this.ready.then(() => this.within.dispatchEvent(new this.within.MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
