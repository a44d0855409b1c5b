"""What must hold of every page that a report writes, and a browser to look at it."""

import base64
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, *flags):
    """The lines that the page writes to Chromium's console, and the document after loading."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--window-size=1340,2400", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


class Page(HTMLParser):
    """Balanced elements, no scripts, nothing that loads from elsewhere."""

    EMPTY = ("meta", "link", "img", "br")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.images, self.ids, self.links, self.text = [], [], set(), [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.EMPTY:
            self.open.append(tag)
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        names = [key for key, _ in attributes]
        assert len(names) == len(set(names)) and not any(name.startswith("on") for name in names)
        values = dict(attributes)
        assert not set(values) & {"srcset", "action", "background", "style"}
        if "id" in values:
            assert values["id"] not in self.ids
            self.ids.add(values["id"])
        if tag == "img":
            assert values["src"].startswith("data:image/svg+xml;base64,") and values["alt"]
            self.images.append(values["src"])
        if "href" in values:
            assert values["href"] == "data:," or values["href"].startswith("#")
            self.links.append(values["href"])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(text):
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert {link[1:] for link in page.links if link.startswith("#")} == page.ids
    assert "url(" not in text and "@import" not in text
    assert not {"nan", "inf"} & set(re.findall(r"\w+", text))
    for image in page.images:
        svg = base64.b64decode(image.split(",")[1])
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("}svg") and b"<script" not in svg
        for element in root.iter():
            for key, value in element.attrib.items():
                assert not key.endswith("href") or value.startswith("#")
                assert "nan" not in value.split()
    return page
