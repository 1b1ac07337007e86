// Browsers do not start workers for pages that are opened from disk. There, the search of the site
// runs in a hidden frame, which looks like a worker to both sides.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement('iframe')
      this.frame.hidden = true
      document.body.append(this.frame)
      const scope = this.frame.contentWindow
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent('message', { data }))
      this.loaded = new Promise((resolve, reject) => {
        const script = scope.document.createElement('script')
        script.onload = resolve
        script.onerror = reject
        script.src = url
        scope.document.body.append(script)
      })
    }

    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent('message', { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
