"""``solvus init NAME``: a study of one's own, short and commented, that runs as it is."""

from __future__ import annotations

from pathlib import Path

from orchestrator.keys import check_study_name, files_of
from tasks.registry import models, unknown

TEMPLATE = """\
# @package _global_
# {name}: which question does this study answer? Say it here, for whoever reads this file.
#
#   solvus plan study={name} --config-dir {folder}     what it takes, before it starts
#   solvus run study={name} --config-dir {folder}      run it; the same command again continues it
#
# What may stand here: `solvus list` names every plug-in, `solvus show NAME` its fields, and
# `solvus run study={name} --config-dir {folder} --cfg` prints everything that is set, defaults included.

defaults:                       # one plug-in of each kind; what is left out is that of `solvus run --cfg`
  - override /model: {model}{pad}# a folder of your own: unet or diffusers, with `model: {{path: FOLDER}}` below
  - override /solver: dpmpp_2m  # solvus list solver
  - override /times: quadratic  # the time grid: solvus list times
  - override /guidance: none    # cfg guides towards a label or a prompt
  - override /strategy: single  # how a budget is spent on one sample: best_of_n, fk_steering, ...
  - override /search: grid      # tpe, cmaes, turbo, ... search instead of trying everything

name: {name}
question: Which of two solvers is better at 4 and at 8 network evaluations?

# What is measured, with intervals. A reward scores one sample, a metric a trial: solvus list reward; solvus list metric
metrics: [frechet, class_accuracy]

num_samples: 256                # samples of a trial. Few are quick; intervals shrink with the square root
batch_size: 256                 # rows of one network call: as many as the memory holds
seed: 0                         # trials share their noise, so differences are paired
# device: cuda                  # where the network runs; cpu when left out
# price_per_device_hour: 2.5    # then `solvus plan` says what it costs

search:
  space:                        # dotted paths of this file, and what each may be
    solver: [ddim, dpmpp_2m]
    nfe: [4, 8]                 # network evaluations along one trajectory; sets the number of steps
    # guidance.scale: {{low: 1.0, high: 3.0}}         # an interval, for a search other than grid
    # strategy.n: {{low: 2, high: 8, when: {{strategy: best_of_n}}}}
"""


def write(name: str, folder: str, model: str) -> Path:
    """Write FOLDER/study/NAME.yaml.

    Args:
        name: of the study and of the file.
        folder: what to name with ``--config-dir`` afterwards.
        model: a plug-in that can be loaded without a path; others need their fields filled in.

    Returns:
        the file.

    Raises:
        ValueError: a name that cannot be one, that is taken, or a model that does not exist.
    """
    check_study_name(name)
    if name in files_of("study"):
        raise ValueError(f"study {name!r} comes with Solvus: solvus run study={name}. Choose another name.")
    if model not in models.names():
        raise unknown("model", model, models.names())
    path = Path(folder).expanduser() / "study" / f"{name}.yaml"
    text = TEMPLATE.format(name=name, folder=folder, model=model, pad=" " * max(1, 11 - len(model)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} is there already. Edit it, or choose another name or --dir.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Choose another --dir.") from None
    return path
