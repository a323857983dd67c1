"""What the README says can be run, runs; what it shows is committed."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_code_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5 and all((ROOT / link).exists() for link in links), links


def test_commands_name_files_that_exist():
    for script in re.findall(r"python ([\w/]+\.py)", README):
        assert (ROOT / script).exists(), script
    assert "pip install -r requirements.txt && pip install -e csrc && pytest" in README
