"""The files that deploy a server say what the program and the package say."""

import json
import re
from pathlib import Path

import yaml

from twinmerge.cli.parser import build_parser
from twinmerge.serve.settings import KEY_VARIABLE, ServeSettings

FOLDER = Path(__file__).resolve().parents[2] / "examples/deploy"


def test_dockerfile_runs_a_command_that_parses_and_checks_the_port_it_listens_at() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    options = build_parser().parse_args([*entry[1:], *compose["services"]["twin"]["command"]])
    assert (str(options.twin), options.port) == ("/twin", ServeSettings().port)
    assert f"127.0.0.1:{options.port}/health" in text
    for path in re.findall(r"^COPY (.*) \./", text, re.MULTILINE):
        assert all((FOLDER.parents[1] / one).exists() for one in path.split())


def test_compose_gives_the_key_to_both_and_more_time_to_stop_than_the_server_takes() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    twin = compose["services"]["twin"]
    assert list(twin["environment"]) == [KEY_VARIABLE]
    assert int(twin["stop_grace_period"].removesuffix("s")) > ServeSettings().drain_s
    scrape = yaml.safe_load(compose["configs"]["scrape"]["content"])["scrape_configs"][0]
    assert scrape["authorization"]["credentials"] == f"${{{KEY_VARIABLE}}}"
    assert scrape["static_configs"] == [{"targets": [f"twin:{ServeSettings().port}"]}]
