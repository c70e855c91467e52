"""The server's sessions: who is admitted, what is batched, where outputs go, and what is left when all have gone.

Order of steps is in test_serving_order.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.spec.ids import BlockRange
from shoal.swarm.admission import PAGE_TOKENS, pages_for
from shoal.swarm.serving import Action, DropCache, Emit, OpenCache, Reply, Serving, ServingConfig, Work
from shoal.wire import messages as msg

CONFIG = ServingConfig(
    model="toy", blocks=BlockRange(4, 8), cache_tokens=640, max_sessions=12, prefill_rows=8, held_items=6, idle_s=100.0
)
NEXT = msg.Hop("next", ["tcp://next:1"])


def sid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def open_(number: int = 0, *, epoch: int = 1, tokens: int = 32, **fields: object) -> msg.Open:
    values: dict[str, object] = {"model": "toy", "start": 4, "end": 8, "stages": 1, "wire": "f32", "next": None}
    values.update(fields)
    return msg.Open(session=sid(number), epoch=epoch, max_tokens=tokens, **values)  # type: ignore[arg-type]


def step(number: int, position: int, rows: int = 1, block: int = 4) -> tuple[msg.StepItem, tuple[int, ...]]:
    return msg.StepItem(sid(number), position, rows, block), tuple(range(position, position + rows))


def replies(actions: Sequence[Action]) -> list[tuple[str, msg.Message]]:
    return [(action.node, action.message) for action in actions if isinstance(action, Reply)]


def run(serving: Serving, now: float = 0.0) -> tuple[list[Work], list[Emit]]:
    """Compute one batch; outputs are the inputs."""
    works = serving.next_batch(now)
    actions = serving.on_computed(works, [work.payload for work in works], now)
    return works, [action for action in actions if isinstance(action, Emit)]


# --- admission -------------------------------------------------------------------------------------------------------


def test_an_admitted_session_gets_its_cache_and_its_driver_an_answer() -> None:
    serving = Serving(CONFIG)
    assert serving.on_open("driver", open_(), 0.0) == [
        OpenCache(sid(0), BlockRange(4, 8), 32),
        Reply("driver", msg.Opened(sid(0), 1)),
    ]
    assert serving.pool.free_tokens == 640 - 32


def test_asking_again_changes_nothing_and_is_answered_again() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(), 0.0)
    assert serving.on_open("driver", open_(), 0.0) == [Reply("driver", msg.Opened(sid(0), 1))]


def test_a_newer_plan_starts_the_session_afresh_in_the_room_it_had() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(tokens=400), 0.0)
    serving.on_steps([step(0, 0, 5)], 0.0)
    run(serving)
    actions = serving.on_open("driver", open_(epoch=2, tokens=400), 0.0)
    assert actions[:2] == [DropCache(sid(0)), OpenCache(sid(0), BlockRange(4, 8), 400)]
    assert serving.position(sid(0)) == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("unknown_model", open_(1, model="other")),
        ("blocks_not_hosted", open_(1, start=3)),
        ("blocks_not_hosted", open_(1, end=9)),
        ("blocks_not_hosted", open_(1, start=6, end=6)),
        ("full", open_(1, tokens=641)),
        ("stale_epoch", open_(0, epoch=4)),
    ],
)
def test_a_session_that_cannot_be_taken_is_refused_with_a_reason_and_costs_nothing(
    code: str, message: msg.Open
) -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(0, epoch=5), 0.0)
    ((node, denied),) = replies(serving.on_open("driver", message, 0.0))
    assert node == "driver"
    assert isinstance(denied, msg.Denied)
    assert denied.code == code
    assert (denied.retry_after_s > 0) == (code == "full"), "only a full server may have room later"
    assert serving.sessions == 1
    assert serving.pool.free_tokens == 640 - 32


def test_the_number_of_sessions_is_bounded() -> None:
    serving = Serving(CONFIG)
    for number in range(CONFIG.max_sessions):
        serving.on_open("driver", open_(number, tokens=1), 0.0)
    ((_, denied),) = replies(serving.on_open("driver", open_(99, tokens=1), 0.0))
    assert isinstance(denied, msg.Denied)
    assert denied.code == "full"


def test_a_session_belongs_to_the_driver_that_opened_it() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(), 0.0)
    ((_, denied),) = replies(serving.on_open("thief", open_(epoch=2), 0.0))
    assert isinstance(denied, msg.Denied)
    assert serving.on_close("thief", [sid(0)], 0.0) == []
    ((_, relink),) = replies(serving.on_relink("thief", msg.Relink(sid(0), 9, NEXT), 0.0))
    assert isinstance(relink, msg.Denied)
    assert serving.sessions == 1


# --- batches ---------------------------------------------------------------------------------------------------------


def test_decode_rows_of_many_sessions_share_a_batch_with_one_chunk_of_a_prompt() -> None:
    serving = Serving(CONFIG)
    for number in range(4):
        serving.on_open("driver", open_(number), 0.0)
    serving.on_steps([step(0, 0), step(1, 0, 8), step(2, 0, 8), step(3, 0)], 0.0)
    assert [(work.session, work.item.rows) for work in run(serving)[0]] == [(sid(0), 1), (sid(1), 8), (sid(3), 1)]
    assert [(work.session, work.item.rows) for work in run(serving)[0]] == [(sid(2), 8)]


def test_a_chunk_larger_than_the_limit_still_runs_by_itself() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(), 0.0)
    serving.on_steps([step(0, 0, 20)], 0.0)
    assert [work.item.rows for work in run(serving)[0]] == [20]


def test_in_a_chain_a_server_takes_its_share_of_the_rows_so_that_the_others_have_work() -> None:
    serving = Serving(CONFIG)
    for number in range(8):
        serving.on_open("driver", open_(number, stages=2), 0.0)
    serving.on_steps([step(number, 0) for number in range(8)], 0.0)
    assert len(run(serving)[0]) == 4
    assert len(run(serving)[0]) == 4


def test_a_step_beyond_the_reservation_or_too_many_held_ones_end_the_session() -> None:
    for steps in ([step(0, 30, 3)], [step(0, 2 + 2 * i) for i in range(CONFIG.held_items + 1)]):
        serving = Serving(CONFIG)
        serving.on_open("driver", open_(), 0.0)
        actions = serving.on_steps(steps, 0.0)
        ((node, gone),) = replies(actions)
        assert node == "driver"
        assert isinstance(gone, msg.Gone)
        assert gone.code == "out_of_order"
        assert DropCache(sid(0)) in actions
        assert serving.pool.free_tokens == 640


# --- where outputs go ------------------------------------------------------------------------------------------------


def test_outputs_are_pushed_to_the_next_server_before_their_copy_goes_to_the_journal() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(next=NEXT), 0.0)
    serving.on_steps([step(0, 0, 2)], 0.0)
    push, journal = run(serving)[1]
    assert (push.hop, push.journal_block) == (NEXT, None)
    assert (journal.node, journal.journal_block) == ("driver", 8)
    assert push.items == journal.items == ((msg.StepItem(sid(0), 0, 2, 8), (0, 1)),)


def test_the_last_server_answers_the_driver_and_writes_no_journal() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(), 0.0)
    serving.on_steps([step(0, 0)], 0.0)
    (result,) = run(serving)[1]
    assert (result.node, result.hop, result.journal_block) == ("driver", None, None)


def test_a_replay_sends_on_only_what_the_others_lack() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(next=NEXT, forward_from=3, journal_from=5), 0.0)
    sent: list[tuple[int, bool]] = []
    for position in range(7):
        serving.on_steps([step(0, position)], 0.0)
        sent += [(position, emit.hop is not None) for emit in run(serving)[1]]
    assert [position for position, push in sent if push] == [3, 4, 5, 6]
    assert [position for position, push in sent if not push] == [5, 6]


def test_sessions_with_the_same_next_server_leave_in_one_frame() -> None:
    serving = Serving(CONFIG)
    for number in range(3):
        serving.on_open("driver", open_(number, next=NEXT), 0.0)
    serving.on_steps([step(number, 0) for number in range(3)], 0.0)
    push, journal = run(serving)[1]
    assert len(push.items) == len(journal.items) == 3


def test_after_a_relink_outputs_go_elsewhere_from_the_position_it_answers() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(next=NEXT), 0.0)
    serving.on_steps([step(0, 0, 3)], 0.0)
    run(serving)
    other = msg.Hop("other", ["tcp://other:1"])
    assert serving.on_relink("driver", msg.Relink(sid(0), 2, other), 0.0) == [
        Reply("driver", msg.Relinked(sid(0), 2, 3))
    ]
    serving.on_steps([step(0, 3)], 0.0)
    assert [emit.hop for emit in run(serving)[1]] == [other, None]
    ((_, denied),) = replies(serving.on_relink("driver", msg.Relink(sid(0), 1, NEXT), 0.0))
    assert isinstance(denied, msg.Denied)
    assert denied.code == "stale_epoch"


# --- losses and ends -------------------------------------------------------------------------------------------------


def test_the_driver_is_told_that_its_next_server_is_lost_and_the_cache_stays() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(0, next=NEXT), 0.0)
    serving.on_open("other", open_(1), 0.0)
    ((node, gone),) = replies(serving.on_push_lost("next"))
    assert (node, gone) == ("driver", msg.Gone([sid(0)], "next_lost", "The connection to next broke."))
    assert serving.sessions == 2


def test_a_failed_batch_ends_its_sessions_only() -> None:
    serving = Serving(CONFIG)
    for number in range(2):
        serving.on_open("driver", open_(number), 0.0)
    serving.on_steps([step(0, 0)], 0.0)
    works = serving.next_batch(0.0)
    actions = serving.on_failed(works, "Broken numbers.", 0.0)
    assert replies(actions) == [("driver", msg.Gone([sid(0)], "failed", "Broken numbers."))]
    assert serving.sessions == 1


def test_a_leaving_server_asks_every_driver_to_move_and_takes_nobody_new() -> None:
    serving = Serving(CONFIG)
    serving.on_open("d0", open_(0), 0.0)
    serving.on_open("d1", open_(1), 0.0)
    assert {node: gone.sessions for node, gone in replies(serving.drain()) if isinstance(gone, msg.Gone)} == {
        "d0": [sid(0)],
        "d1": [sid(1)],
    }
    ((_, denied),) = replies(serving.on_open("d0", open_(2), 0.0))
    assert isinstance(denied, msg.Denied)
    assert denied.code == "draining"
    serving.on_steps([step(0, 0)], 0.0)
    assert len(run(serving)[1]) == 1, "what it has goes on until it is closed"


def test_a_session_that_nobody_touches_is_dropped_and_its_driver_told() -> None:
    serving = Serving(CONFIG)
    serving.on_open("driver", open_(0), 0.0)
    serving.on_open("driver", open_(1), 0.0)
    serving.on_steps([step(1, 0)], 60.0)
    assert serving.expire(99.0) == []
    assert replies(serving.expire(101.0)) == [("driver", msg.Gone([sid(0)], "expired", "Unused for 100 s."))]


# --- any order of events ---------------------------------------------------------------------------------------------


class AnyEvents(RuleBasedStateMachine):
    """Two drivers do anything in any order. Caches, reservations and sessions always agree; in the end all is free."""

    def __init__(self) -> None:
        super().__init__()
        self.serving = Serving(CONFIG)
        self.caches: dict[bytes, int] = {}
        self.owner: dict[bytes, str] = {}
        self.under_way: list[list[Work]] = []
        self.now = 0.0

    drivers = st.sampled_from(["d0", "d1"])
    numbers = st.integers(0, 5)

    def perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, OpenCache):
                assert action.session not in self.caches, "a cache is dropped before it is opened again"
                self.caches[action.session] = action.max_tokens
            elif isinstance(action, DropCache):
                del self.caches[action.session]

    @rule(driver=drivers, number=numbers, epoch=st.integers(0, 5), tokens=st.integers(0, 300))
    def open(self, driver: str, number: int, epoch: int, tokens: int) -> None:
        actions = self.serving.on_open(driver, open_(number, epoch=epoch, tokens=tokens), self.now)
        if any(isinstance(action, OpenCache) for action in actions):
            self.owner[sid(number)] = driver
        self.perform(actions)

    @rule(number=numbers, position=st.integers(0, 40), rows=st.integers(1, 12), block=st.sampled_from([4, 4, 4, 6]))
    def steps(self, number: int, position: int, rows: int, block: int) -> None:
        self.perform(self.serving.on_steps([step(number, position, rows, block)], self.now))

    @rule(number=numbers, rows=st.integers(1, 12))
    def next_step(self, number: int, rows: int) -> None:
        position = self.serving.position(sid(number))
        if position is not None:
            self.perform(self.serving.on_steps([step(number, position, rows)], self.now))

    @rule()
    def begin(self) -> None:
        works = self.serving.next_batch(self.now)
        assert len({work.session for work in works}) == len(works)
        for work in works:
            assert work.item.position == self.serving.position(work.session)
            assert work.item.position + work.item.rows <= self.caches[work.session]
        if works:
            self.under_way.append(works)

    @rule(failed=st.booleans())
    def finish(self, failed: bool) -> None:
        if self.under_way:
            works = self.under_way.pop(0)
            outputs = [work.payload for work in works]
            if failed:
                self.perform(self.serving.on_failed(works, "", self.now))
            else:
                self.perform(self.serving.on_computed(works, outputs, self.now))

    @rule(driver=drivers, numbers=st.lists(numbers, max_size=3))
    def close(self, driver: str, numbers: list[int]) -> None:
        self.perform(self.serving.on_close(driver, map(sid, numbers), self.now))

    @rule(driver=drivers)
    def lose_driver(self, driver: str) -> None:
        self.perform(self.serving.on_driver_lost(driver, self.now))
        assert all(self.owner[session] != driver for session in self.caches)

    @rule(seconds=st.sampled_from([0.1, 30.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.serving.expire(self.now))

    @invariant()
    def books_agree(self) -> None:
        held = sum(pages_for(tokens) for tokens in self.caches.values())
        assert self.serving.pool.total_pages - self.serving.pool.free_pages == held <= 640 // PAGE_TOKENS
        assert self.serving.sessions == len(self.caches)
        assert self.serving.queue_rows >= 0

    def teardown(self) -> None:
        for driver in ("d0", "d1"):
            self.lose_driver(driver)
        assert not self.caches
        assert self.serving.pool.free_pages == self.serving.pool.total_pages
        assert self.serving.next_batch(self.now) == []


TestAnyEvents = AnyEvents.TestCase
