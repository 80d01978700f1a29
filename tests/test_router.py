"""Section 10: routes on raw segments, and who may ask: Host, pages of other origins, the key."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any, Callable

import pytest

import mflocal
from mflocal import Problem, Request, Response, Router

LOCAL = "127.0.0.1:8080"


def problem_of(call: Callable[[], Any]) -> Problem:
    with pytest.raises(Problem) as caught:
        call()
    return caught.value


def handler(name: str) -> Callable[[Request], Response]:
    return lambda request: mflocal.json_response([name, request.params])


ROUTES = [
    ("GET", "/"),
    ("GET", "/ping"),
    ("GET", "/flows"),
    ("GET", "/flows/{flow}"),
    ("POST", "/flows/{flow}"),
    ("GET", "/flows/autocomplete"),
    ("GET", "/flows/{flow}/runs"),
    ("POST", "/flows/{flow}/run"),
    ("GET", "/flows/{flow}/runs/autocomplete"),
    ("GET", "/flows/{flow}/runs/{run}"),
    ("PATCH", "/flows/{flow}/runs/{run}/tag/mutate"),
    ("GET", "/flows/{flow}/runs/{run}/steps"),
    ("POST", "/flows/{flow}/runs/{run}/heartbeat"),
    ("GET", "/plugin/{name}"),
    ("GET", "/plugin/{name}/{file}"),
    ("GET", "/flows/{name}/other"),
    ("GET", "/flows/autocomplete/deep/down"),
]


@pytest.fixture
def router() -> Router:
    router = Router()
    for method, pattern in ROUTES:
        router.add(method, pattern, handler(f"{method} {pattern}"))
    return router


def ask(router: Router, method: str, path: str) -> Any:
    return mflocal.loads(router.dispatch(Request(method, path)).body)


@pytest.mark.parametrize(
    "method, path, route, params",
    [
        ("GET", "/", "GET /", {}),
        ("GET", "/ping", "GET /ping", {}),
        ("GET", "/flows/F", "GET /flows/{flow}", {"flow": "F"}),
        ("POST", "/flows/F", "POST /flows/{flow}", {"flow": "F"}),
        ("GET", "/flows/autocomplete", "GET /flows/autocomplete", {}),
        ("POST", "/flows/autocomplete", "POST /flows/{flow}", {"flow": "autocomplete"}),
        ("GET", "/flows/autocomplete/runs", "GET /flows/{flow}/runs", {"flow": "autocomplete"}),
        ("GET", "/flows/autocomplete/deep/down", "GET /flows/autocomplete/deep/down", {}),
        (
            "GET",
            "/flows/autocomplete/runs/autocomplete",
            "GET /flows/{flow}/runs/autocomplete",
            {"flow": "autocomplete"},
        ),
        ("GET", "/flows/F/runs/autocomplete", "GET /flows/{flow}/runs/autocomplete", {"flow": "F"}),
        (
            "GET",
            "/flows/F/runs/autocomplete/steps",
            "GET /flows/{flow}/runs/{run}/steps",
            {"flow": "F", "run": "autocomplete"},
        ),
        (
            "PATCH",
            "/flows/F/runs/1/tag/mutate",
            "PATCH /flows/{flow}/runs/{run}/tag/mutate",
            {"flow": "F", "run": "1"},
        ),
        ("GET", "/flows/N/other", "GET /flows/{name}/other", {"name": "N"}),
        ("HEAD", "/flows/F", "GET /flows/{flow}", {"flow": "F"}),
        ("GET", "/flows/%46", "GET /flows/{flow}", {"flow": "F"}),
        ("GET", "/flows/a%2Fb", "GET /flows/{flow}", {"flow": "a/b"}),
        ("GET", "/flows/a%252Fb", "GET /flows/{flow}", {"flow": "a%2Fb"}),
        ("GET", "/flows/%2e%2e/runs", "GET /flows/{flow}/runs", {"flow": ".."}),
        ("GET", "/flows/../runs", "GET /flows/{flow}/runs", {"flow": ".."}),
        ("GET", "/flows/a+b", "GET /flows/{flow}", {"flow": "a+b"}),
        ("GET", "/flows/gr%C3%B6%C3%9fe", "GET /flows/{flow}", {"flow": "größe"}),
        ("GET", "/flows/%61utocomplete", "GET /flows/{flow}", {"flow": "autocomplete"}),
    ],
)
def test_found(router: Router, method: str, path: str, route: str, params: dict[str, str]) -> None:
    assert ask(router, method, path) == [route, params]


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/flows/",
        "/flows/F/",
        "/ping/",
        "//",
        "//ping",
        "/flows//runs",
        "/%66lows",
        "/flows%2FF",
        "/flows/F/runs/1/tag",
        "/flows/F/runs/1/tag/mutate/x",
        "/Ping",
        "*",
        "",
        "ping",
        "/plugin/a/b/c",
        "/flows/autocomplete/deep",
    ],
)
def test_row_38_not_found(router: Router, path: str) -> None:
    if path != "*":
        assert problem_of(lambda: router.dispatch(Request("GET", path))).status == 404
        assert problem_of(lambda: router.dispatch(Request("OPTIONS", path))).status == 404
    else:
        assert problem_of(lambda: router.dispatch(Request("GET", path))).status == 405


@pytest.mark.parametrize(
    "method, path, allow",
    [
        ("DELETE", "/flows/F", "GET, HEAD, OPTIONS, POST"),
        ("GET", "/flows/F/run", "OPTIONS, POST"),
        ("HEAD", "/flows/F/run", "OPTIONS, POST"),
        ("PUT", "/flows/autocomplete", "GET, HEAD, OPTIONS, POST"),
        ("POST", "/ping", "GET, HEAD, OPTIONS"),
        ("TRACE", "/flows/F/runs/1/tag/mutate", "OPTIONS, PATCH"),
    ],
)
def test_wrong_method(router: Router, method: str, path: str, allow: str) -> None:
    problem = problem_of(lambda: router.dispatch(Request(method, path)))
    assert (problem.status, problem.headers["Allow"]) == (405, allow)
    answer = router.dispatch(Request("OPTIONS", path))
    assert (answer.status, answer.headers) == (204, [("Allow", allow)])


def test_options_star(router: Router) -> None:
    assert router.dispatch(Request("OPTIONS", "*")).headers == [
        ("Allow", "GET, HEAD, OPTIONS, PATCH, POST")
    ]


@pytest.mark.parametrize("segment", ["%", "%zz", "%00", "%ff", "%C0%AE"])
def test_row_37_bad_encoding_in_a_parameter(router: Router, segment: str) -> None:
    assert problem_of(lambda: router.dispatch(Request("GET", "/flows/" + segment))).status == 400


def test_fallback_gets_only_what_nothing_else_knows(router: Router) -> None:
    router.fallback = lambda request: mflocal.text_response(request.path)
    assert router.dispatch(Request("GET", "/static/../x")).body == b"/static/../x"
    assert router.dispatch(Request("HEAD", "/F/run/1/")).body == b"/F/run/1/"
    assert ask(router, "GET", "/ping")[0] == "GET /ping"
    assert problem_of(lambda: router.dispatch(Request("POST", "/static/x"))).status == 404
    assert problem_of(lambda: router.dispatch(Request("GET", "/flows/F/run"))).status == 405
    assert problem_of(lambda: router.dispatch(Request("GET", "*"))).status == 405
    assert router.dispatch(Request("OPTIONS", "/static/x")).headers == [
        ("Allow", "GET, HEAD, OPTIONS")
    ]


def test_async_handler() -> None:
    router = Router()

    async def answer(request: Request) -> Response:
        return Response(204)

    router.add("GET", "/", answer)
    result = router.dispatch(Request("GET", "/"))
    assert inspect.isawaitable(result)

    async def wait() -> Any:
        return await result

    assert asyncio.run(wait()).status == 204


def test_bad_patterns() -> None:
    router = Router()
    router.add("GET", "/a/{b}", handler("x"))
    for method, pattern in [
        ("GET", "/a/{b}"),
        ("GET", "/a/{c}"),
        ("GET", "a"),
        ("POST", "/{a}/{a}"),
    ]:
        with pytest.raises(ValueError):
            router.add(method, pattern, handler("y"))
    router.add("POST", "/a/{c}", handler("z"))
    assert ask(router, "POST", "/a/1") == ["z", {"c": "1"}]
    assert ask(router, "GET", "/a/1") == ["x", {"b": "1"}]


# -- Host


def check_host(host: str, allowed: tuple[str, ...] = (), bound: str = "127.0.0.1") -> int:
    try:
        mflocal.check_host(Request("GET", authority=host), allowed, bound)
    except Problem as problem:
        return problem.status
    return 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.255.0.9",
        "[::1]",
        "[::1]:8080",
        "[0:0::1]",
        "ui.localhost",
        "ui.localhost:80",
    ],
)
def test_row_42_loopback_hosts(host: str) -> None:
    assert check_host(host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "xlocalhost",
        "128.0.0.1",
        "127.1",
        "127.0.0.256",
        "0.0.0.0",
        "[::]",
        "[::2]",
        "[::ffff:127.0.0.1]",
        "192.168.0.1",
        "2130706433",
        "localhost.",
        "127.0.0",
        "127.0.0.1.",
        "evil-localhost",
    ],
)
def test_row_42_foreign_hosts(host: str) -> None:
    assert check_host(host) == 403


def test_row_42_the_message_names_the_flag() -> None:
    problem = problem_of(
        lambda: mflocal.check_host(Request("GET", authority="box.example:80"), (), "127.0.0.1")
    )
    assert "--allow-host box.example" in problem.detail and not problem.close


def test_row_42_configured_hosts() -> None:
    assert check_host("Box.Example:99", ("box.example", "other")) == 200
    assert check_host("a.box.example", ("box.example",)) == 403
    assert check_host("[2001:db8::1]:80", ("2001:db8::1",)) == 200
    assert check_host("192.168.0.1", (), "192.168.0.1") == 200
    assert check_host("[fe80::1]", (), "fe80::1") == 200
    for wildcard in ("0.0.0.0", "::", ""):
        assert check_host("0.0.0.0", (), wildcard) == 403
        assert check_host("192.168.0.1", (), wildcard) == 403
        assert check_host("0.0.0.0", (wildcard,), "192.168.0.1") == 403


@pytest.mark.parametrize("host", ["", "a b", "[", ":80"])
def test_row_15_missing_and_malformed_hosts(host: str) -> None:
    assert check_host(host) == 400


# -- Origin


@pytest.mark.parametrize(
    "origin, expected",
    [
        ("http://localhost:3000", True),
        ("http://localhost", True),
        ("https://localhost:8443", True),
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:3000", True),
        ("http://ui.localhost", True),
        ("http://box.example", True),
        ("https://box.example", True),
        ("http://box.example:80", True),
        ("https://box.example:443", True),
        ("http://ui.example:3000", True),
        ("http://UI.example:3000", True),
        ("https://ui.example:3000", False),
        ("http://ui.example", False),
        ("http://ui.example:30000", False),
        ("http://x.ui.example:3000", False),
        ("http://box.example:81", False),
        ("null", False),
        ("", False),
        ("*", False),
        ("localhost", False),
        ("file://", False),
        ("http://", False),
        ("ftp://localhost", False),
        ("chrome-extension://localhost", False),
        ("http://localhost.evil.example", False),
        ("http://localhost@evil.example", False),
        ("http://evil.example", False),
        ("http://localhost/", False),
        ("http://localhost:99999", False),
        ("http://127.0.0.1.evil.example", False),
        ("http://localhost, http://evil.example", False),
        ("HTTP://evil.example", False),
        ("http://0.0.0.0:8080", False),
        ("http://[::1", False),
        ("http://local host", False),
        ("http://localhost\x80", False),
    ],
)
def test_row_43_allowed_origin(origin: str, expected: bool) -> None:
    assert (
        mflocal.allowed_origin(origin, ("http://ui.example:3000", "null"), "box.example")
        is expected
    )


@pytest.mark.parametrize(
    "origin, authority, expected",
    [
        ("http://a:1", "a:1", True),
        ("http://a:1", "A:1", True),
        ("http://a:1", "a:2", False),
        ("http://a", "a:80", True),
        ("https://a", "a", True),
        ("https://a", "a:443", True),
        ("https://a", "a:80", False),
        ("http://[::1]:1", "[0::1]:1", True),
        ("http://b", "a", False),
        ("null", "a", False),
        ("http://a", "", False),
        ("https://a:8443", "a", False),
    ],
)
def test_same_origin(origin: str, authority: str, expected: bool) -> None:
    assert mflocal.same_origin(origin, authority) is expected


def check_browser(method: str, **headers: str) -> Any:
    request = Request(
        method,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        authority=LOCAL,
    )
    try:
        return mflocal.check_browser(request, ("http://ui.example",))
    except Problem as problem:
        assert not problem.close
        return problem.status


UI = "http://localhost:3000"


@pytest.mark.parametrize(
    "headers, read, write",
    [
        ({}, None, None),  # requests, curl
        ({"content_type": "text/plain"}, None, None),
        ({"origin": UI}, UI, 403),
        (
            {"origin": "http://ui.example", "sec_fetch_site": "cross-site"},
            "http://ui.example",
            "http://ui.example",
        ),
        ({"origin": UI, "sec_fetch_site": "cross-site", "sec_fetch_mode": "cors"}, UI, 403),
        # A card's own script: it may read, as the UI that shows it does.
        (
            {"origin": "http://" + LOCAL, "sec_fetch_site": "same-origin"},
            "http://" + LOCAL,
            403,
        ),
        ({"origin": "http://evil.example"}, 403, 403),
        ({"origin": "http://evil.example", "sec_fetch_mode": "websocket"}, 403, 403),
        ({"origin": "null"}, 403, 403),
        ({"origin": ""}, 403, 403),
        ({"sec_fetch_site": "same-origin"}, None, 403),
        ({"sec_fetch_site": "none", "sec_fetch_mode": "navigate"}, None, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, None, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403, 403),
        ({"sec_fetch_site": "cross-site"}, 403, 403),
        ({"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors"}, None, 403),
        ({"sec_fetch_site": "something-new"}, 403, 403),
    ],
)
def test_row_44_pages_of_other_origins(headers: dict[str, str], read: Any, write: Any) -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        assert check_browser(method, **headers) == read
    for method in ("POST", "PATCH", "PUT", "DELETE"):
        assert check_browser(method, **headers) == write


def test_row_43_cors_headers_are_never_a_wildcard() -> None:
    headers = dict(mflocal.cors_headers(UI))
    assert headers["Access-Control-Allow-Origin"] == UI
    assert headers["Vary"] == "Origin"
    assert headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert "Access-Control-Allow-Credentials" not in headers


def test_row_46_json_of_others_cannot_be_embedded() -> None:
    headers = dict(mflocal.cors_headers(None))
    assert headers == {"Vary": "Origin", "Cross-Origin-Resource-Policy": "same-origin"}
    data = mflocal.json_response({}).encode(Request("GET"), extra=mflocal.cors_headers(None))
    assert b"\r\nCross-Origin-Resource-Policy: same-origin\r\n" in data
    assert b"\r\nX-Content-Type-Options: nosniff\r\n" in data


def preflight_request(**more: str) -> Request:
    headers = {"origin": UI, "access-control-request-method": "POST", **more}
    return Request("OPTIONS", "/flows/F", headers=headers, authority=LOCAL)


def test_preflight() -> None:
    request = preflight_request()
    assert mflocal.is_preflight(request)
    response = mflocal.preflight(request)
    headers = dict(response.headers)
    assert response.status == 204
    assert headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST, PATCH"
    assert headers["Access-Control-Allow-Headers"] == "content-type, x-api-key"
    assert int(headers["Access-Control-Max-Age"]) > 0
    assert "Access-Control-Allow-Private-Network" not in headers
    data = response.encode(request, extra=mflocal.cors_headers(mflocal.check_browser(request)))
    assert b"Access-Control-Allow-Origin: " + UI.encode() + b"\r\n" in data
    private = mflocal.preflight(
        preflight_request(**{"access-control-request-private-network": "true"})
    )
    assert dict(private.headers)["Access-Control-Allow-Private-Network"] == "true"


@pytest.mark.parametrize("path", ["/flows/F", "/nothing"])
def test_the_router_answers_preflights(router: Router, path: str) -> None:
    request = preflight_request()
    request.path = path
    assert router.dispatch(request).headers == mflocal.preflight(request).headers


def test_a_preflight_of_a_foreign_page_is_refused() -> None:
    request = preflight_request(origin="http://evil.example")
    assert problem_of(lambda: mflocal.admit(request)).status == 403


def test_what_is_no_preflight() -> None:
    assert not mflocal.is_preflight(Request("OPTIONS", headers={"origin": UI}))
    assert not mflocal.is_preflight(
        Request("OPTIONS", headers={"access-control-request-method": "GET"})
    )
    assert not mflocal.is_preflight(Request("GET", headers=preflight_request().headers))


# -- the key

KEY = "s3cret"
COOKIE = mflocal.key_cookie(KEY)[1].partition(";")[0]


def check_key(
    method: str = "GET", path: str = "/flows", key: str | None = KEY, **headers: str
) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        mflocal.check_key(Request(method, path, headers=names, authority=LOCAL), key)
    except Problem as problem:
        return problem.status
    return 200


def test_row_45_the_key() -> None:
    assert check_key(key=None) == 200
    assert check_key() == 401
    assert check_key(x_api_key=KEY) == 200
    assert check_key("POST", x_api_key=KEY) == 200
    for wrong in ("", "s3cre", "s3cret ", "S3CRET", "s3cretx", "\xe4", COOKIE.partition("=")[2]):
        assert check_key(x_api_key=wrong) == 401
    assert check_key("GET", "/ping") == 200
    assert check_key("GET", "/ping/") == 401
    assert check_key("GET", "/%70ing") == 401
    assert check_key("OPTIONS") == 401
    assert check_key("OPTIONS", origin=UI, access_control_request_method="POST") == 200


def test_row_45_401_says_what_is_wanted() -> None:
    problem = problem_of(lambda: mflocal.check_key(Request("GET", "/flows"), KEY))
    assert "METAFLOW_SERVICE_AUTH_KEY" in problem.detail and KEY not in problem.detail
    assert problem.headers["WWW-Authenticate"] == "x-api-key"


def test_the_cookie_is_not_the_key_and_stays_with_the_browser() -> None:
    name, value = mflocal.key_cookie(KEY)
    assert name == "Set-Cookie" and value.startswith(mflocal.KEY_COOKIE + "=")
    assert (
        KEY not in value
        and "HttpOnly" in value
        and "SameSite=Strict" in value
        and "Path=/" in value
    )
    assert mflocal.cookie_value("a") != mflocal.cookie_value("b")


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({"cookie": COOKIE}, 200),
        ({"cookie": "a=b; " + COOKIE + "; c=d"}, 200),
        ({"cookie": mflocal.KEY_COOKIE + "=planted; " + COOKIE}, 200),
        ({"cookie": COOKIE, "origin": "http://" + LOCAL, "sec_fetch_site": "same-origin"}, 200),
        ({"cookie": COOKIE, "sec_fetch_site": "none"}, 200),
        ({"cookie": COOKIE, "sec_fetch_site": "same-site"}, 401),
        ({"cookie": COOKIE, "sec_fetch_site": "cross-site"}, 401),
        ({"cookie": COOKIE, "origin": UI}, 401),
        ({"cookie": COOKIE, "origin": "null"}, 401),
        ({"cookie": COOKIE + "x"}, 401),
        ({"cookie": mflocal.KEY_COOKIE + "=" + KEY}, 401),
        ({"cookie": mflocal.KEY_COOKIE}, 401),
        ({"cookie": "x" + COOKIE}, 401),
        ({"cookie": ";;=;"}, 401),
    ],
)
def test_the_cookie_reads_on_our_own_pages(headers: dict[str, str], expected: int) -> None:
    assert check_key("GET", **headers) == expected
    assert check_key("HEAD", **headers) == expected
    assert check_key("POST", **headers) == 401
    assert check_key("PATCH", **headers) == 401


def test_admit_checks_in_order_and_gives_the_headers() -> None:
    def admit(authority: str, method: str = "POST", **headers: str) -> Any:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return mflocal.admit(
            Request(method, "/flows/F", headers=names, authority=authority), auth_key=KEY
        )

    assert admit(LOCAL, x_api_key=KEY) == mflocal.cors_headers(None)
    assert admit(LOCAL, x_api_key=KEY, method="GET", origin=UI) == mflocal.cors_headers(UI)
    assert problem_of(lambda: admit(LOCAL, x_api_key=KEY, origin=UI)).status == 403
    evil = {"x_api_key": KEY, "origin": "http://evil.example"}
    assert "--allow-host" in problem_of(lambda: admit("evil.example", **evil)).detail
    problem = problem_of(lambda: admit(LOCAL, **evil))
    assert problem.status == 403 and "Access-Control-Allow-Origin" not in problem.headers
    problem = problem_of(lambda: admit(LOCAL, method="GET", origin=UI))
    assert problem.status == 401 and problem.headers["Access-Control-Allow-Origin"] == UI
    assert (
        b"Access-Control-Allow-Origin: " + UI.encode() in mflocal.problem_response(problem).encode()
    )
