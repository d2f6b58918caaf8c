"""What a rank does during one rollout of the world, as a table: every legal transition is a row."""

from enum import Enum


class RankState(Enum):
    ROLLOUT = "rollout"
    """Its replica still decodes."""
    IDLE = "idle"
    """Its replica is done, others decode; it does nothing."""
    TRAINING = "training"
    """Between a micro-step of drafter training and the next look at the board."""
    FAILED = "failed"
    """Its trainer raised; it waits, and trains no more in this run."""
    BACK = "back"
    """It has left the tail for where all ranks meet; nothing of the tail runs on it."""


class Event(Enum):
    OWN_ROLLOUT_ENDED = "own rollout ended"
    TRAINING_BEGAN = "training began"
    TRAINING_ENDED = "training ended"
    TRAINER_RAISED = "trainer raised"
    LEFT_TAIL = "left the tail"
    NEXT_ROLLOUT = "next rollout"


TRANSITIONS: dict[tuple[RankState, Event], RankState] = {
    (RankState.ROLLOUT, Event.OWN_ROLLOUT_ENDED): RankState.IDLE,
    (RankState.IDLE, Event.TRAINING_BEGAN): RankState.TRAINING,
    (RankState.TRAINING, Event.TRAINING_ENDED): RankState.IDLE,
    (RankState.TRAINING, Event.TRAINER_RAISED): RankState.FAILED,
    (RankState.IDLE, Event.LEFT_TAIL): RankState.BACK,
    (RankState.FAILED, Event.LEFT_TAIL): RankState.BACK,
    (RankState.BACK, Event.NEXT_ROLLOUT): RankState.ROLLOUT,
}


class Rank:
    """One rank's state; whatever the table does not list is a RuntimeError."""

    def __init__(self) -> None:
        self.state = RankState.BACK

    def on(self, event: Event) -> None:
        """Take a transition."""
        if (self.state, event) not in TRANSITIONS:
            raise RuntimeError(f"a rank in state {self.state.value!r} cannot take the event {event.value!r}")
        self.state = TRANSITIONS[self.state, event]
