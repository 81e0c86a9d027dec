"""Pages, and the static files that they use."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from marketflow import api
from tests.api.world import World

STATIC = Path(api.__file__).parent / "static"
PAGES = {"/": STATIC / "market/index.html", "/docs": STATIC / "docs/index.html"}
USED = re.compile(r'(?:src|href)="([^"]+)"')
LINK = re.compile(r'<a href="(https:[^"]+)" rel="noreferrer">')
IMPORTED = re.compile(r'^(?:import|export) [^;]*?from "([^"]+)";', re.MULTILINE)
SWAGGER_UI = STATIC / "swagger-ui"
LIGHTWEIGHT_CHARTS = STATIC / "lightweight-charts"


@pytest.mark.parametrize("path", PAGES)
def test_page_policy_forbids_other_servers(path: str) -> None:
    answer = World().ask(path)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert {source for sources in policy.values() for source in sources.split()} == {"'none'", "'self'", "data:"}
    assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-store")


@pytest.mark.parametrize(("path", "file"), PAGES.items())
def test_page_links_only_to_served_files(path: str, file: Path) -> None:
    html = World().ask(path).text
    assert html == file.read_text()
    # Links for readers are not loaded by the page.
    html = LINK.sub("", html)
    used = USED.findall(html)
    assert used
    for link in used:
        assert World().ask(f"/{link}").status_code == 200, link
    assert "<style" not in html
    assert not re.findall(r"<script(?![^>]* src=)|\son[a-z]+=|style=|(?:src|href|action)=\"?https?:", html)


@pytest.mark.parametrize("module", sorted((STATIC / "market").glob("*.js")), ids=lambda path: path.name)
def test_script_imports_exist_and_no_html_is_injected(module: Path) -> None:
    source = module.read_text()
    assert source.startswith("/**" if module.name != "colours.js" else "//")
    for name in IMPORTED.findall(source):
        assert name.startswith("."), name
        path = (module.parent / name).resolve().relative_to(STATIC)
        assert World().ask(f"/static/{path.as_posix()}").status_code == 200, name
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("module", sorted((STATIC / "market").glob("*.js")), ids=lambda path: path.name)
def test_scripts_are_valid_javascript(module: Path) -> None:
    command = ["node", "--input-type=module", "--check"]
    found = subprocess.run(command, input=module.read_text(), capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("docs/docs.js", "text/javascript"),
        ("docs/docs.css", "text/css"),
        ("swagger-ui/swagger-ui-bundle.js", "text/javascript"),
        ("lightweight-charts/lightweight-charts.js", "text/javascript"),
        ("market/market.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_static_file_is_revalidated_by_etag(name: str, media_type: str) -> None:
    path = f"/static/{name}"
    first = World().ask(path)
    assert first.headers["content-type"].partition(";")[0] == media_type
    assert first.content == (STATIC / name).read_bytes()
    assert (first.headers["cache-control"], first.headers["x-content-type-options"]) == ("no-cache", "nosniff")
    tag = first.headers["etag"]
    assert tag.startswith('W/"')
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}'):
        again = World().ask(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert World().ask(path, headers={"If-None-Match": '"other"'}).content == first.content
    headed = World().ask(path, "HEAD")
    assert (headed.headers, headed.content) == (first.headers, b"")


@pytest.mark.parametrize(
    "name",
    [
        *("", "nothing.js", "docs", "docs/", "docs/index.html", "swagger-ui/LICENSE", "swagger-ui/README.md"),
        *("market/index.html", "lightweight-charts/NOTICE"),
        *("../pages.py", "..%2Fpages.py", "%2e%2e/__init__.py", "/etc/passwd", "%00", "docs/../icon.svg%20"),
    ],
)
def test_other_files_are_404(name: str) -> None:
    answer = World().ask(f"/static/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_static_files_allow_only_get_and_head() -> None:
    answer = World().ask("/static/icon.svg", "POST")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_swagger_ui_has_licences_and_version() -> None:
    assert {file.name for file in SWAGGER_UI.iterdir()} == {
        *("swagger-ui-bundle.js", "swagger-ui-bundle.js.LICENSE.txt", "swagger-ui.css"),
        *("LICENSE", "NOTICE", "README.md"),
    }
    assert "Apache License" in (SWAGGER_UI / "LICENSE").read_text()
    version = (SWAGGER_UI / "README.md").read_text().splitlines()[0].removeprefix("# Swagger UI ")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f'"{version}"' in (SWAGGER_UI / "swagger-ui-bundle.js").read_text()


def test_charts_have_licence_and_page_has_notice() -> None:
    names = {file.name for file in LIGHTWEIGHT_CHARTS.iterdir()}
    assert names == {"lightweight-charts.js", "LICENSE", "NOTICE", "README.md"}
    assert "Apache License" in (LIGHTWEIGHT_CHARTS / "LICENSE").read_text()
    title = (LIGHTWEIGHT_CHARTS / "README.md").read_text().splitlines()[0]
    version = title.removeprefix("# Lightweight Charts ")
    assert f"Lightweight Charts™ v{version}\n" in (LIGHTWEIGHT_CHARTS / "lightweight-charts.js").read_text()[:200]
    page = (STATIC / "market/index.html").read_text()
    notice = (LIGHTWEIGHT_CHARTS / "NOTICE").read_text().split("\n")[1].removesuffix(" https://www.tradingview.com/")
    assert notice in page
    assert LINK.findall(page) == ["https://www.tradingview.com/"]
    assert "attributionLogo: false" in (STATIC / "market/chart.js").read_text()  # it would need a <style>


def test_styles_and_scripts_use_no_other_server() -> None:
    for style in STATIC.rglob("*.css"):
        assert all(url.startswith("data:") for url in re.findall(r"url\(\"?([^)\"]*)", style.read_text())), style
        assert "@import" not in style.read_text()
    assert 'url: "openapi.json"' in (STATIC / "docs/docs.js").read_text()
    assert "validatorUrl: null" in (STATIC / "docs/docs.js").read_text()
