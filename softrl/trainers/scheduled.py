"""Arguments of a configuration that may be schedules: numbers that change over training."""

from typing import Any, ClassVar

from softrl.objectives.schedules import EpochSchedule, Schedule, parse_epoch_schedule, parse_schedule


class ScheduledArguments:
    """
    What a configuration does with arguments that are a number or a schedule.

    A subclass names them in `_SCHEDULED`, with whether each is a whole number, in `_MAY_BE_NONE` those that may be
    left out, and in `_BY_EPOCH` those that may be given by epoch.
    """

    _SCHEDULED: ClassVar[dict[str, bool]] = {}
    _MAY_BE_NONE: ClassVar[tuple[str, ...]] = ()
    _BY_EPOCH: ClassVar[tuple[str, ...]] = ()

    def schedules(self) -> dict[str, Any]:
        """The settings that may change over training, by name; without those that are not set.

        Raises:
            ValueError: a value is neither a number nor a schedule.
        """
        given = {name: getattr(self, name) for name in self._SCHEDULED}
        for name, value in given.items():
            if value is None and name not in self._MAY_BE_NONE:
                raise ValueError(f"{name} is None; give it a number or a schedule")
        return {name: self._schedule(name, value) for name, value in given.items() if value is not None}

    def _schedule(self, name: str, value: Any) -> Schedule | EpochSchedule:
        if name in self._BY_EPOCH:
            return parse_epoch_schedule(value, name)
        return parse_schedule(value, name, is_integer=self._SCHEDULED[name])

    def constants_as_numbers(self) -> None:
        """Replace what does not change by its number: the command line gives numbers as text."""
        for name, schedule in self.schedules().items():
            if schedule.is_constant:
                setattr(self, name, schedule.first)

    def values_at(self, step: int, max_steps: int, epoch: float = 0.0) -> dict[str, int | float]:
        """The values of `schedules` at a step of the run, and at an epoch."""
        return {
            name: schedule.at(epoch) if isinstance(schedule, EpochSchedule) else schedule.at(step, max_steps)
            for name, schedule in self.schedules().items()
        }
