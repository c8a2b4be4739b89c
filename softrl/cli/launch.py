"""`--accelerate_config NAME|PATH`: the same command again, under `accelerate launch`.

Left out: clusters that start one command a machine in ways of their own; call `accelerate launch` there.
"""

import os
import sys

import yaml

from softrl.cli.arguments import find_shipped

OPTION = "--accelerate_config"
# Of `accelerate launch`, and passed on to it; everything else is the command's own.
LAUNCH_OPTIONS = (
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--gpu_ids",
)


def launch(command: str, argv: list[str]) -> int | None:
    """Run `softrl COMMAND ARGV` under Accelerate where ARGV asks for it; returns its exit status, or None.

    Raises:
        ValueError: no such configuration, or options of `accelerate launch` without one.
    """
    own, options = _split(argv)
    if OPTION not in options:
        if options:
            raise ValueError(f"{', '.join(sorted(options))} belongs to a launch; give {OPTION} NAME|PATH as well")
        return None
    from softrl.trainers.engines import ASKED_FOR

    path = find_shipped("accelerate_configs", options.pop(OPTION), "Accelerate configuration")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "num_processes" not in settings:
        raise ValueError(f"{path} is no configuration of Accelerate: it says no num_processes; see accelerate config")
    asked_for = int(options.get("--num_processes", settings["num_processes"]))
    os.environ[ASKED_FOR] = str(asked_for)
    if settings.get("use_cpu"):
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it Accelerate starts one process, and says nothing
    given = [text for option in options.items() for text in option]
    words = ["launch", "--config_file", str(path), *given, "-m", "softrl", command, *own]
    return _accelerate(words)


def _accelerate(words: list[str]) -> int:
    from accelerate.commands.accelerate_cli import main

    sys.argv = ["accelerate", *words]
    try:
        main()
    except SystemExit as stop:  # what the processes ended with has been printed
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command's own arguments, and those of the launch by name."""
    own: list[str] = []
    options: dict[str, str] = {}
    words = iter([part for word in argv for part in _parts(word)])
    for word in words:
        if word not in (OPTION, *LAUNCH_OPTIONS):
            own.append(word)
            continue
        value = next(words, None)
        if value is None or value.startswith("--"):
            raise ValueError(f"{word} needs a value")
        options[word] = value
    return own, options


def _parts(word: str) -> list[str]:
    name = word.split("=", 1)[0]
    return word.split("=", 1) if "=" in word and name in (OPTION, *LAUNCH_OPTIONS) else [word]
