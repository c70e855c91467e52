"""Load makes one span the bottleneck: an idle server of another span moves there, and no session notices.

The servers decide by the real swarm.balance over their own views, which lag and differ. What is claimed: within
MOVES_WITHIN_S of the load's begin the thin span has a second server, nobody moves twice, and every generation has all
its tokens, each of them right.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.sim import toy
from shoal.sim.links import LinkConfig, Network
from shoal.sim.machines import MODEL, Driver, Generation, Server, State
from shoal.sim.report import Report
from shoal.sim.world import World, Wrong
from shoal.spec.ids import BlockRange
from shoal.swarm.balance import Move, Rebalancer
from shoal.swarm.placement import ModelNeeds
from shoal.swarm.serving import Serving, ServingConfig
from shoal.swarm.session import SessionConfig
from shoal.wire import messages as msg

NUM_BLOCKS = 12
NEEDS = ModelNeeds((1 << 20,) * NUM_BLOCKS)
MOVES_WITHIN_S = 60.0
GOES_ON_S = 60.0
"""How long the load goes on after the move: nobody may move back."""
LOADS_S = 3.0
"""What reading the weights takes."""
NUM_TOKENS = 60


class FreeServer(Server):
    """A server that chose its blocks itself, and leaves them for better ones."""

    def __init__(
        self, world: World, network: Network, name: str, seeds: Sequence[str], config: ServingConfig, step_ms: float
    ) -> None:
        super().__init__(world, network, name, seeds, config, step_ms)
        self.moves: list[tuple[float, Move]] = []
        self._rebalancer = Rebalancer(name)
        self._move: Move | None = None
        self._loading = False

    def record(self, incarnation: int) -> msg.Record:
        return msgspec.structs.replace(super().record(incarnation), serves=MODEL, memory_bytes=9 << 20)

    def state(self) -> State:
        return "loading" if self._loading else super().state()

    def on_round(self) -> None:
        super().on_round()
        if self._loading:
            return
        if self._move is None:
            move = self._rebalancer.consider(self.view.live(self.now()), MODEL, NEEDS, self.now())
            if move is not None:
                self.world.note(f"{self.name} moves to {move.blocks}: {move.reason}")
                self._move = move
                self.leave()
        elif not self.serving.sessions:
            self._load(self._move)

    def _load(self, move: Move) -> None:
        self._move, self._loading = None, True
        self._rebalancer.moved(self.now())
        self.config = ServingConfig(MODEL, move.blocks, self.config.cache_tokens)
        self.publish()

        def loaded() -> None:
            self.moves.append((self.world.now, move))
            self.serving = Serving(self.config)
            self._loading = False
            self.publish()

        self.after(LOADS_S, loaded, background=True)


def relieved(seed: int, *, trace: list[str] | None = None) -> Report:
    """One server for the long span, two or three for the short one, and more sessions than the long one can take."""
    world = World(seed, trace=trace)
    rng = world.rng
    network = Network(world, LinkConfig(latency_s=(0.0005, 0.01)))
    drivers = [Driver(world, network, f"d{i}", ["d0", "d1"], NUM_BLOCKS, SessionConfig()) for i in range(2)]
    cut = rng.choice([7, 8, 9])
    spans = [BlockRange(0, cut)] + [BlockRange(cut, NUM_BLOCKS)] * rng.choice([2, 3])
    step_ms = rng.uniform(2.0, 5.0)
    servers = [
        FreeServer(world, network, f"s{i}", ["d0", "d1"], ServingConfig(MODEL, span, 1 << 16), step_ms)
        for i, span in enumerate(spans)
    ]
    for machine in [*drivers, *servers]:
        machine.start()
    world.run_for(30.0)
    if any(server.moves for server in servers):
        raise Wrong("a server moved while nobody asked for anything")

    generations: list[Generation] = []
    began_s, going = world.now, True
    for driver in drivers:
        for _ in range(8):
            _keep_asking(driver, generations, lambda: going)

    def moves() -> list[tuple[float, Move]]:
        return sorted((each for server in servers for each in server.moves), key=lambda each: each[0])

    world.run_until(lambda: bool(moves()), MOVES_WITHIN_S, "an idle server has moved to the bottleneck")
    world.run_for(GOES_ON_S)
    going = False
    world.run_until(lambda: all(each.ended for each in generations), 60.0, "all generations have ended")
    for each in generations:
        if each.error is not None or each.tokens != each.expected:
            raise Wrong(f"a generation ended with {len(each.tokens)} of {each.want} tokens and {each.error!r}")
    if len({move.node for _, move in moves()}) != len(moves()):
        raise Wrong(f"a server moved to and fro: {[move for _, move in moves()]}")
    moved_s, move = moves()[0]
    before = _rate(generations, began_s, moved_s - LOADS_S)
    after = _rate(generations, moved_s + 10.0, moved_s + GOES_ON_S)
    figures = {
        "moved_after_s": round(moved_s - began_s, 1),
        "gain_expected": round(move.gain, 2),
        "gain_seen": round(after / before, 2),
        "generations": len(generations),
    }
    return Report("bottleneck", seed, world.now, world.events, figures, {"move": 1}, trace)


def _keep_asking(driver: Driver, generations: list[Generation], going: object) -> None:
    """One user who asks again as soon as the last answer is whole."""
    assert callable(going)
    rng = driver.world.rng
    prompt = [rng.randrange(toy.VOCABULARY) for _ in range(rng.randint(1, 20))]
    tokens, outputs = toy.generate(prompt, NUM_BLOCKS, NUM_TOKENS)
    generation = Generation(prompt, NUM_TOKENS, 16, tokens, outputs, len(prompt) - 1)
    generations.append(generation)
    driver.generate(generation)

    def look() -> None:
        if not generation.ended:
            driver.after(0.05, look, background=True)
        elif going():
            _keep_asking(driver, generations, going)

    look()


def _rate(generations: Sequence[Generation], start_s: float, end_s: float) -> float:
    """Generations that ended per second."""
    ended = [each for each in generations if each.ended_at_s is not None and start_s <= each.ended_at_s < end_s]
    return max(len(ended), 1) / max(end_s - start_s, 1e-9)
