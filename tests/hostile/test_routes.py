"""Every route x every kind of credential: nothing answers that should not, and the routes are the application's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from shoal.errors import ShoalError
from shoal.hostile import routes
from shoal.hostile.http import application


@pytest.fixture(scope="module")
def matrix() -> tuple[list[routes.Attempt], list[routes.Attempt]]:
    return routes.attempts()


def test_no_route_answers_without_a_key_that_may_use_it(
    matrix: tuple[list[routes.Attempt], list[routes.Attempt]],
) -> None:
    tried, _ = matrix
    assert [str(attempt) for attempt in tried if attempt.unexpected] == []
    assert not [str(attempt) for attempt in tried if attempt.status >= 500]
    assert len({attempt.credential.name for attempt in tried}) >= 40


def test_with_a_good_key_every_route_answers_so_the_others_were_refused_for_their_credential(
    matrix: tuple[list[routes.Attempt], list[routes.Attempt]], tmp_path: Path
) -> None:
    _, control = matrix
    answered = {attempt.path for attempt in control if attempt.status == 200}
    app, accounts = application(tmp_path)
    accounts.close()
    assert answered == set(routes.paths(app))


def test_probes_and_lists_are_routes_that_exist(tmp_path: Path) -> None:
    app, accounts = application(tmp_path)
    accounts.close()
    assert set(routes.paths(app)) >= routes.PROBES | routes.LISTS


def test_a_new_route_that_forgets_its_key_is_found(tmp_path: Path) -> None:
    app, accounts = application(tmp_path)
    app.router.routes.append(Route("/v1/{thing}/forgotten", lambda request: PlainTextResponse("hello")))
    found = [
        attempt
        for each in routes.credentials("good", "other", "revoked")
        for attempt in asyncio.run(routes.walk(app, each))
        if attempt.unexpected
    ]
    accounts.close()
    assert {attempt.path for attempt in found} == {"/v1/{thing}/forgotten"}
    assert "no key" in {attempt.credential.name for attempt in found}


def test_a_mount_is_refused_because_nobody_would_look_into_it(tmp_path: Path) -> None:
    app, accounts = application(tmp_path)
    accounts.close()
    app.router.routes.append(Mount("/files", app=PlainTextResponse("x")))
    with pytest.raises(ShoalError, match="Mount"):
        routes.paths(app)
