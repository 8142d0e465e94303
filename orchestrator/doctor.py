"""What is installed here, what is missing, and what to do next."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from typing import Any

NEEDED = ("torch", "diffusers", "safetensors", "pyarrow", "numpy", "scikit-learn", "hydra-core", "optuna", "pillow")
OPTIONAL = {
    "ray": "pip install 'ray[default]'; without it use executor=local",
    "mlflow": "pip install mlflow; without it use tracker=none",
    "optuna-dashboard": "pip install optuna-dashboard; solvus ui then shows searches too",
    "plotly": "pip install plotly; reports need it",
}

FIRST_STEPS = (
    ("solvus run study=tiny", "a first study, exact models only: half a minute"),
    ("solvus init mine", "write a study of your own, with comments"),
    ("solvus list", "every plug-in; `solvus show NAME` explains one"),
    ('eval "$(solvus completion bash)"', "complete verbs, plug-ins and fields; also zsh, fish"),
)


def examine() -> list[dict[str, Any]]:
    """One finding a line: what, found, ok, needed, fix."""
    findings = [
        {
            "what": "python",
            "found": sys.version.split()[0],
            "ok": sys.version_info >= (3, 11),
            "needed": True,
            "fix": "install Python 3.11 or newer",
        }
    ]
    for package in (*NEEDED, *OPTIONAL):
        try:
            found, ok = metadata.version(package), True
        except metadata.PackageNotFoundError:
            found, ok = "absent", False
        fix = OPTIONAL.get(package, f"pip install {package}, or make setup")
        findings.append({"what": package, "found": found, "ok": ok, "needed": package in NEEDED, "fix": fix})
    try:
        import torch

        cuda = torch.cuda.is_available()
        seen = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if cuda else "none"
    except ImportError:
        cuda, seen = False, "none"
    hidden = shutil.which("nvidia-smi") is not None and not cuda
    findings.append(
        {
            "what": "accelerator",
            "found": seen if cuda else "none: studies run on the CPU",
            "ok": not hidden,
            "needed": False,
            "fix": "a GPU is there but torch does not see it: make setup TORCH=cuda",
        }
    )
    root = os.environ.get("SOLVUS_ROOT", "runs")
    parent = root if os.path.isdir(root) else os.path.dirname(os.path.abspath(root)) or "."
    findings.append(
        {
            "what": "root",
            "found": os.path.abspath(root),
            "ok": os.access(parent, os.W_OK),
            "needed": True,
            "fix": "set SOLVUS_ROOT or root=DIR to a folder that can be written",
        }
    )
    return findings


def what_to_do(findings: list[dict[str, Any]]) -> list[str]:
    """What to type next: what mends the findings, the needed ones first, or else the first steps."""
    missing = [f for f in findings if f["needed"] and not f["ok"]]
    lacking = [f for f in findings if not f["needed"] and not f["ok"]]
    lines = []
    if missing:
        lines += [f"{len(missing)} needed thing(s) missing. What to do:"]
        lines += [f"  {f['what']}: {f['fix']}" for f in missing]
    else:
        lines += ["all that is needed is here. What to do next:"]
        lines += [f"  {command:<38} {why}" for command, why in FIRST_STEPS]
    if lacking:
        lines += ["not needed, and missing:", *(f"  {f['what']}: {f['fix']}" for f in lacking)]
    return lines
