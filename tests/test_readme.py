"""What the README says can be run, runs; what it shows is committed."""

import json
import re

import ordered_reduce
import pytest
import torch
from conftest import ROOT
from ordered_reduce.operations import OPERATIONS

README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def undeterministic_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


def code(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_code_runs_as_it_stands():
    section = README.split("## My training run will not repeat")[1].split("\n## ")[0]   # has a test of its own
    blocks = [block for block in code(README) if block not in code(section)]
    assert blocks and code(section)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("results/**/*.md"))])
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()) if not link.startswith("http")]
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert len(links) > 5 or page != "README.md"


def test_commands_name_files_that_exist():
    for script in re.findall(r"python ([\w/]+\.py)", README):
        assert (ROOT / script).exists(), script
    assert "pip install -r requirements.txt && pip install -e csrc && pytest" in README


def test_my_training_run_will_not_repeat(capsys):
    """What that section says its three programs do."""
    section = README.split("## My training run will not repeat")[1].split("\n## ")[0]
    blocks = code(section)
    names, printed = [], []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace := {})
        names.append(namespace)
        printed.append(capsys.readouterr().out)
    table = {tuple(re.split(r"\s{2,}", line)[:2]): re.split(r"\s{2,}", line)[3:] for line in printed[0].splitlines()}
    assert table["operation", "pass"][:2] == ["repeats", "equal channels"]
    assert {where[0] for where, said in table.items() if said[0] == "no"} == {"1 (Jitter)", "the whole model (Sequential)"}
    assert table["2 (Dropout)", "forward"][:2] == ["yes", "no"]
    assert printed[1].strip() == re.search(r"# (\{.*\})", blocks[1])[1]
    assert torch.are_deterministic_algorithms_enabled()
    rows = ordered_reduce.audit(names[2]["model"], torch.randn(32, 3, 8, 8))
    rows = [row for row in rows if row["pass"] in ("gradient of weight", "gradient of bias")]
    assert len(rows) == 4 and all(row["repeats"] == row["threads"] == "yes" for row in rows)
    saved = json.loads((ROOT / "results/audit/cpu.json").read_text())
    assert {row["operation"] for row in saved["rows"]} == set(OPERATIONS)

    def operations(check, *verdicts):
        return len({row["operation"] for row in saved["rows"] if row[check] in verdicts})

    text = " ".join(section.split())
    assert f"list of {len(OPERATIONS)} operations" in text and operations("repeats", "no", "-") == 0
    assert (f"{operations('equal channels', 'no')} of the {operations('equal channels', 'yes', 'no')} that have" in text and
            f"{operations('threads', 'no')} of {operations('threads', 'yes', 'no')} give" in text and
            f"{operations('batch', 'no')} of {operations('batch', 'yes', 'no')} in a smaller" in text)
    assert not re.search(r"\b(16|64|160) channels", str([row["failures"].get("equal channels") for row in saved["rows"]]))
