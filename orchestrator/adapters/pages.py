"""MLflow's pages and optuna-dashboard over one root, bound to this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.adapters.mlflow_tracker import local_uri


def serve(root: str, port: int, optuna_port: int) -> int:
    """Run both until Ctrl-C; end both together.

    Raises:
        ValueError: the root holds no study yet.
    """
    if not (Path(root) / "mlflow.db").exists():
        raise ValueError(f"{root} holds no mlflow.db yet. Run a study first: solvus run study=tiny")
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    commands = [
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", local_uri(root), "--host", "127.0.0.1",
         "--port", str(port), "--workers", "1", "--default-artifact-root", (Path(root) / "mlartifacts").as_uri()]
    ]  # fmt: skip
    print(f"MLflow: http://127.0.0.1:{port}", flush=True)
    dashboard = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent)) or shutil.which(
        "optuna-dashboard"
    )
    searched = (Path(root) / "optuna.db").exists()
    if searched and importlib.util.find_spec("optuna_dashboard") and dashboard:
        commands.append(
            [dashboard, f"sqlite:///{Path(root) / 'optuna.db'}", "--host", "127.0.0.1", "--port", str(optuna_port)]
        )
        print(f"Optuna: http://127.0.0.1:{optuna_port}", flush=True)
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(0.3)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
