"""A headless Chromium for the tests of a page, driven over its DevTools pipe by the standard
library alone.

Chromium reads from file descriptor 3 and writes to 4; messages are JSON, each ended by a zero byte
(https://chromedevtools.github.io/devtools-protocol).
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One tab. errors: what the console, a script or a load complained of since the last open();
    requests: every address that was asked for."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        their_input, self.output = os.pipe()
        self.input, their_output = os.pipe()

        def connect():                               # in the child, before it becomes Chromium
            high = [os.dup(their_input), os.dup(their_output)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=connect, close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(their_input)
        os.close(their_output)
        self.number, self.buffer, self.session = 0, b"", None
        self.errors, self.requests, self.loaded = [], [], False
        target = next(target for target in self.send("Target.getTargets")["targetInfos"]
                      if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method, **params):
        """Call a method of the protocol; its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self, seconds=60):
        """The next message. Events are noted on the way."""
        while b"\0" not in self.buffer:
            assert select.select([self.input], [], [], seconds)[0], "no word from Chromium"
            data = os.read(self.input, 1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(params["args"])
            case "Log.entryAdded":
                self.errors.append(params["entry"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Page.loadEventFired":
                self.loaded = True
        return message

    def open(self, path, fragment=""):
        """Load a file of this machine, from nothing."""
        for address in ("about:blank", path.resolve().as_uri() + fragment):
            self.errors, self.requests, self.loaded = [], [], False
            self.send("Page.navigate", url=address)
            while not self.loaded:
                self.receive()

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key, shift=False):
        """A key of the keyboard, as the browser itself would deliver it."""
        text = {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **text)

    def emulate(self, width, height, dark=False, still=False, scale=1, mobile=False):
        """The size of the window, dark mode, and a wish for no motion."""
        features = [("prefers-color-scheme", "dark" if dark else "light"),
                    ("prefers-reduced-motion", "reduce" if still else "no-preference")]
        self.send("Emulation.setEmulatedMedia",
                  features=[{"name": name, "value": value} for name, value in features])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=scale, mobile=mobile)
        self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)

    def screenshot(self, path):
        time.sleep(0.4)                              # let what moves come to rest
        data = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()
