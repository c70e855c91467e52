"""The driver's session, one event at a time: what it asks of servers, and what it does when one is lost.

Rows are numbers: row i of a prompt is i. Two servers host blocks 0:4 (a, and a2 as its spare) and 4:8 (b and b2).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shoal.errors import Full, NotFinite, SwarmIncomplete
from shoal.spec.ids import BlockRange
from shoal.swarm.routing import Hop
from shoal.swarm.session import (
    Action,
    Deliver,
    Failed,
    Feed,
    Live,
    Recovered,
    Session,
    SessionConfig,
    Tell,
)
from shoal.wire import messages as msg

ID = bytes(16)
CONFIG = SessionConfig(patience_s=10.0, open_timeout_s=5.0, progress_timeout_s=60.0, avoid_s=5.0, max_replans=6)
FIRST, LAST = BlockRange(0, 4), BlockRange(4, 8)


class Swarm:
    """The servers that a plan may use, best first."""

    def __init__(self, **spans: BlockRange) -> None:
        self.spans = spans

    def plan(self, blocks: BlockRange, avoid: frozenset[str], need_tokens: int, now: float) -> Sequence[Hop] | None:
        hops: list[Hop] = []
        at = blocks.start
        while at < blocks.end:
            found = next((node for node, span in self.spans.items() if node not in avoid and at in span), None)
            if found is None:
                return None
            end = min(blocks.end, self.spans[found].end)
            hops.append(Hop(found, (f"tcp://{found}:1",), BlockRange(at, end)))
            at = end
        return hops


def with_spares() -> Swarm:
    return Swarm(a=FIRST, a2=FIRST, b=LAST, b2=LAST)


def session_on(swarm: Swarm, **options: int) -> Session:
    return Session(ID, model="toy", num_blocks=8, max_tokens=32, wire="f32", plan=swarm.plan, config=CONFIG, **options)


def opened(session: Session, *nodes: str, epoch: int = 1, now: float = 0.0) -> list[Action]:
    return [action for node in nodes for action in session.on_message(node, msg.Opened(ID, epoch), now)]


def live(swarm: Swarm, **options: int) -> Session:
    """A session whose chain a, b stands."""
    session = session_on(swarm, **options)
    session.start(0.0)
    opened(session, "a", "b")
    return session


def computed(session: Session, position: int, rows: int, now: float, *, last: str = "b") -> list[Action]:
    """Rows go through both stages: the journal of the first arrives, then the result of the last."""
    payload = tuple(range(position, position + rows))
    actions = session.on_journal("a", 4, msg.StepItem(ID, position, rows, 4), payload, now)
    return actions + session.on_result(last, msg.StepItem(ID, position, rows, 8), payload, now)


def told(actions: Sequence[Action]) -> list[tuple[str, msg.Message]]:
    return [(action.node, action.message) for action in actions if isinstance(action, Tell)]


def names(actions: Sequence[Action]) -> list[tuple[str, str]]:
    return [(node, type(message).__name__) for node, message in told(actions)]


def fed(actions: Sequence[Action]) -> list[tuple[str, list[int]]]:
    return [(a.node, [row for part in a.parts for row in part]) for a in actions if isinstance(a, Feed)]


def delivered(actions: Sequence[Action]) -> list[int]:
    return [row for action in actions if isinstance(action, Deliver) for row in action.payload]


# --- opening and running ---------------------------------------------------------------------------------------------


def test_every_server_of_the_chain_is_asked_for_its_blocks_and_told_the_next_one() -> None:
    (a, first), (b, last) = told(session_on(with_spares()).start(0.0))
    assert isinstance(first, msg.Open)
    assert isinstance(last, msg.Open)
    assert (a, first.start, first.end, first.next) == ("a", 0, 4, msg.Hop("b", ["tcp://b:1"]))
    assert (b, last.start, last.end, last.next) == ("b", 4, 8, None)
    assert first.stages == last.stages == 2
    assert first.max_tokens == last.max_tokens == 32


def test_what_is_fed_before_the_chain_stands_leaves_when_it_does() -> None:
    session = session_on(with_spares())
    session.start(0.0)
    assert session.feed(3, (0, 1, 2), 0.0) == []
    assert opened(session, "b") == []
    actions = opened(session, "a")
    assert actions[0] == Live()
    assert fed(actions) == [("a", [0, 1, 2])]
    assert session.live


def test_outputs_are_handed_on_once_and_in_order_however_they_arrive() -> None:
    session = live(with_spares())
    session.feed(6, tuple(range(6)), 0.0)

    def result(position: int, rows: int) -> list[int]:
        payload = tuple(range(position, position + rows))
        return delivered(session.on_result("b", msg.StepItem(ID, position, rows, 8), payload, 0.0))

    assert result(2, 2) == []
    assert result(0, 3) == [0, 1, 2, 3]
    assert result(0, 3) == []
    assert result(3, 3) == [4, 5]


def test_outputs_below_the_wanted_position_are_not_handed_on() -> None:
    session = live(with_spares(), results_from=5)
    session.feed(6, tuple(range(6)), 0.0)
    assert delivered(computed(session, 0, 6, 0.0)) == [5]


def test_a_long_prompt_is_sent_a_window_ahead_and_no_further() -> None:
    session = live(with_spares())
    sent = [fed(session.feed(2, (2 * i, 2 * i + 1), 0.0)) for i in range(10)]
    window = CONFIG.window_chunks + 2  # and one for each stage
    assert [bool(steps) for steps in sent] == [True] * window + [False] * (10 - window)
    assert fed(computed(session, 0, 2, 0.0)) == [("a", [10, 11])]


def test_more_rows_than_reserved_are_the_callers_mistake() -> None:
    session = live(with_spares())
    session.feed(32, tuple(range(32)), 0.0)
    with pytest.raises(ValueError, match="exceed the 32"):
        session.feed(1, (32,), 0.0)


def test_closing_frees_the_cache_on_every_server_and_nothing_more_happens() -> None:
    session = live(with_spares())
    session.feed(1, (0,), 0.0)
    assert names(session.close()) == [("a", "Close"), ("b", "Close")]
    assert computed(session, 0, 1, 0.0) == []
    assert session.on_peer_lost("a", "closed", 0.0) == []
    assert session.feed(1, (1,), 0.0) == []
    assert session.wake_at is None


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_lost_last_stage_is_opened_elsewhere_linked_and_fed_from_the_journal() -> None:
    session = live(with_spares())
    session.feed(5, tuple(range(5)), 0.0)
    computed(session, 0, 5, 1.0)

    actions = session.on_peer_lost("b", "closed", 2.0)
    assert names(actions) == [("b2", "Open")], "the survivor is linked only when the new server knows the session"
    actions = opened(session, "b2", epoch=2)
    assert told(actions) == [("a", msg.Relink(ID, 2, msg.Hop("b2", ["tcp://b2:1"])))]
    assert not session.live
    # The survivor had come to position 5: those rows come from the journal, later ones from the survivor itself.
    actions = session.on_message("a", msg.Relinked(ID, 2, 5), 2.1)
    assert actions[0] == Live()
    assert fed(actions) == [("b2", [0, 1, 2, 3, 4])]

    assert fed(session.feed(1, (5,), 2.2)) == [("a", [5])]
    actions = computed(session, 5, 1, 2.5, last="b2")
    assert delivered(actions) == [5]
    (recovered,) = [action for action in actions if isinstance(action, Recovered)]
    assert (recovered.cause, recovered.blocks, recovered.gone) == ("closed", ("4:8",), ("b",))
    assert recovered.replayed_rows == 5


def test_rows_that_the_survivor_pushes_while_it_is_relinked_are_not_replayed_twice() -> None:
    session = live(with_spares())
    session.feed(3, (0, 1, 2), 0.0)
    computed(session, 0, 3, 0.0)
    session.on_peer_lost("b", "closed", 1.0)
    opened(session, "b2", epoch=2)
    session.feed(1, (3,), 1.0)
    # It relinked at 3 and then pushed row 3 itself: the journal copy of row 3 stays here.
    assert fed(session.on_message("a", msg.Relinked(ID, 2, 3), 1.0)) == [("b2", [0, 1, 2]), ("a", [3])]
    assert fed(session.on_journal("a", 4, msg.StepItem(ID, 3, 1, 4), (3,), 1.1)) == []


def test_a_lost_first_stage_is_fed_the_inputs_again_and_spares_the_next_one_what_it_has() -> None:
    session = live(with_spares())
    session.feed(4, (0, 1, 2, 3), 0.0)
    computed(session, 0, 4, 0.5)
    ((node, message),) = told(session.on_peer_lost("a", "silent", 1.0))
    assert node == "a2"
    assert isinstance(message, msg.Open)
    assert (message.forward_from, message.journal_from) == (4, 4)
    assert message.next == msg.Hop("b", ["tcp://b:1"])
    assert fed(opened(session, "a2", epoch=2)) == [("a2", [0, 1, 2, 3])]


def test_a_server_that_failed_is_avoided_and_taken_again_when_that_time_is_over() -> None:
    swarm = Swarm(a=FIRST, b=LAST)
    session = live(swarm)
    assert session.on_peer_lost("b", "closed", 0.0) == []
    assert session.on_view_changed(CONFIG.avoid_s - 0.1) == []
    assert names(session.on_view_changed(CONFIG.avoid_s + 0.1)) == [("b", "Open")]


def test_a_broken_push_link_blames_the_next_server_but_only_softly() -> None:
    """It answers us, so it is taken again at once when there is no other."""
    for swarm, replacement in ((with_spares(), "b2"), (Swarm(a=FIRST, b=LAST), "b")):
        actions = live(swarm).on_message("a", msg.Gone([ID], "next_lost", ""), 1.0)
        assert names(actions) == [("b", "Close"), (replacement, "Open")]


def test_numbers_that_are_not_finite_twice_are_nobodys_failure_and_end_the_session_with_their_name() -> None:
    session = live(with_spares())
    actions = session.on_message("b", msg.Gone([ID], "not_finite", "row 0 holds NaN"), 1.0)
    assert names(actions) == [("b", "Close"), ("b2", "Open")]
    opened(session, "b2", epoch=2)
    session.on_message("a", msg.Relinked(ID, 2, 0), 1.0)
    actions = session.on_message("b2", msg.Gone([ID], "not_finite", "row 0 holds NaN"), 2.0)
    (failed,) = [action for action in actions if isinstance(action, Failed)]
    assert isinstance(failed.error, NotFinite)
    assert "row 0 holds NaN" in str(failed.error)
    assert session.ended


def test_answers_about_an_earlier_plan_are_ignored() -> None:
    session = live(with_spares())
    session.on_peer_lost("b", "closed", 0.0)
    assert opened(session, "b2", epoch=1) == []
    assert session.on_message("b2", msg.Denied(ID, 1, "full", "", 1.0), 0.0) == []
    assert session.on_message("b", msg.Gone([ID], "expired", ""), 0.0) == []
    assert names(opened(session, "b2", epoch=2)) == [("a", "Relink")]


def test_a_leaving_server_hands_over_when_somebody_can_take_over_and_else_goes_on() -> None:
    actions = live(with_spares()).on_message("b", msg.Gone([ID], "draining", ""), 1.0)
    assert names(actions) == [("b", "Close"), ("b2", "Open")]

    swarm = Swarm(a=FIRST, b=LAST)
    session = live(swarm)
    assert session.on_message("b", msg.Gone([ID], "draining", ""), 1.0) == []
    assert session.live
    session.feed(1, (0,), 1.0)
    assert delivered(computed(session, 0, 1, 1.0)) == [0]
    swarm.spans["b2"] = LAST
    assert names(session.on_view_changed(1.5)) == [("b", "Close"), ("b2", "Open")]


# --- waiting, and its ends -------------------------------------------------------------------------------------------


def test_without_servers_it_waits_for_its_patience_and_then_says_so() -> None:
    session = session_on(Swarm())
    assert session.start(0.0) == []
    assert session.on_timer(CONFIG.patience_s - 0.1) == []
    (failed,) = session.on_timer(CONFIG.patience_s)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, SwarmIncomplete)
    assert failed.error.retry_after_s == CONFIG.patience_s
    assert session.ended


def test_a_swarm_that_is_full_says_so_at_once_and_when_to_come_back() -> None:
    session = session_on(Swarm(a=FIRST, b=LAST))
    session.start(0.0)
    actions = session.on_message("a", msg.Denied(ID, 1, "full", "", 7.0), 0.1)
    (failed,) = [action for action in actions if isinstance(action, Failed)]
    assert isinstance(failed.error, Full)
    assert failed.error.retry_after_s == 7.0
    assert ("b", "Close") in names(actions)


def test_a_server_that_does_not_answer_open_is_replaced_after_a_while() -> None:
    session = session_on(with_spares())
    session.start(0.0)
    opened(session, "a")
    assert session.wake_at == CONFIG.open_timeout_s
    assert session.on_timer(CONFIG.open_timeout_s - 0.1) == []
    assert ("b2", "Open") in names(session.on_timer(CONFIG.open_timeout_s))


def test_only_a_server_that_owes_an_output_is_ever_called_stuck() -> None:
    session = live(with_spares())
    assert session.wake_at is None
    session.feed(2, (0, 1), 100.0)
    assert session.wake_at == 100.0 + CONFIG.progress_timeout_s
    session.on_journal("a", 4, msg.StepItem(ID, 0, 2, 4), (0, 1), 110.0)  # the first stage has done its part
    assert session.wake_at == 110.0 + CONFIG.progress_timeout_s
    assert names(session.on_timer(session.wake_at)) == [("b", "Close"), ("b2", "Open")]


def test_plans_without_progress_end_after_a_bounded_number_of_them() -> None:
    session = session_on(Swarm(**{f"s{i}": BlockRange(0, 8) for i in range(50)}))
    actions = session.start(0.0)
    plans = 0
    while not any(isinstance(action, Failed) for action in actions):
        plans += 1
        assert plans <= CONFIG.max_replans
        node = session.chain[0].node
        actions = session.on_peer_lost(node, "closed", 0.0)
    assert plans == CONFIG.max_replans
    assert session.ended


def test_outputs_of_what_was_never_fed_are_ignored() -> None:
    session = live(with_spares())
    session.feed(2, (0, 1), 1.0)
    assert session.on_result("b", msg.StepItem(ID, 1, 2, 8), (1, 2), 1.1) == []
    assert session.on_journal("a", 4, msg.StepItem(ID, 5, 2, 4), (5, 6), 1.1) == []
    assert session._logs[4]._early == {}
