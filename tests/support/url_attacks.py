"""The attacks by attachment URL, and what the attacker's site and DNS answer."""

import asyncio
import gzip
from collections.abc import Callable
from dataclasses import dataclass, field

from support.sites import (
    PRIVATE,
    PUBLIC,
    Answer,
    endless,
    redirect,
    silence,
    status,
)

# {port} and {tls} are the ports of http and https, {other} is another port, {one} a unique label.
Fill = Callable[[str], str]


Page = Callable[[Fill], Answer]


@dataclass(frozen=True)
class Attack:
    """A URL, what the attacker's site answers by path, and what our environment is."""

    url: str
    pages: dict[str, Page] = field(default_factory=dict)
    environment: tuple[str, ...] = ()


def to(location: str, code: int = 302) -> Page:
    return lambda fill: redirect(fill(location)).replace(b"302", b"%d" % code)


def page(answer: Answer) -> Page:
    return lambda _: answer


def visit(answer: Page, **more: Page) -> Attack:
    """The attacker's site, where `answer` waits."""
    pages = {"/first": answer, **{f"/{path}": page for path, page in more.items()}}
    return Attack(f"http://{PUBLIC}:{{port}}/first", pages)


def at(host: str, path: str = "") -> Attack:
    return Attack(f"http://{host}:{{port}}/{path}")


def slowly(seconds: float, answer: bytes) -> Answer:
    async def slow(_: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        writer.write(answer)

    return slow


async def hang_up(_: str, writer: asyncio.StreamWriter) -> None:
    writer.close()


def body(head: str, *, chunked: bool = False) -> Answer:
    """An answer whose body has no end."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000000000"
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n" if chunked else bytes(65536)
    return endless(f"HTTP/1.1 {head}\r\n{length}\r\n\r\n".encode(), chunk)


def bomb(head: str) -> bytes:
    """64 MiB of zeros, well packed."""
    data = gzip.compress(bytes(64 << 20), 1)
    headers = f"Content-Encoding: gzip\r\nContent-Length: {len(data)}"
    return f"HTTP/1.1 {head}\r\n{headers}\r\n\r\n".encode() + data


TRAP = f"http://{PRIVATE}:{{port}}/"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


# The answers of DNS: addresses, or cases of `Names.find`. Subdomains have the same answers.
ZONE: dict[str, list[str]] = {
    "public.test": [PUBLIC],
    "mixed.test": [PUBLIC, PRIVATE],
    "mixed-backwards.test": [PRIVATE, PUBLIC],
    "mixed-families.test": [PUBLIC, "::1"],
    "mixed-mapped.test": [PUBLIC, "::ffff:127.0.0.1"],
    "many.test": [*[PUBLIC] * 20, PRIVATE],
    "ipv6.test": ["::1"],
    "unspecified.test": ["0.0.0.0", "::"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "compatible.test": ["::127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "6to4.test": ["2002:7f00:1::"],
    "teredo.test": ["2001:0:7f00:1::"],
    "link-local.test": ["fe80::1"],
    "metadata.test": ["169.254.169.254"],
    "metadata.google.internal": ["169.254.169.254"],
    "azure.test": ["168.63.129.16"],
    "rebind.test": ["rebind"],
    "silent.test": ["silent"],
    "half.test": ["half"],
}


# What is a URL, and well formed: the check has to reject it.
CHECKED: dict[str, Attack] = {
    # The address itself.
    "loopback": at(PRIVATE),
    "loopback elsewhere": at("127.9.9.9"),
    "unspecified": at("0.0.0.0"),
    "private 10": at("10.0.0.1"),
    "private 172.16": at("172.16.0.1"),
    "private 192.168": at("192.168.0.1"),
    "shared 100.64": at("100.64.0.1"),
    "link-local": at("169.254.0.1"),
    "multicast": at("224.0.0.1"),
    "broadcast": at("255.255.255.255"),
    "metadata": at("169.254.169.254"),
    "metadata of containers": at("169.254.170.2"),
    "metadata of Azure": at("168.63.129.16"),
    "metadata of Alibaba": at("100.100.100.200"),
    "metadata of Oracle": at("192.0.0.192"),
    "metadata over IPv6": at("[fd00:ec2::254]"),
    "metadata by name": at("metadata.google.internal"),
    "IPv6 loopback": at("[::1]"),
    "IPv6 loopback in full": at("[0:0:0:0:0:0:0:1]"),
    "IPv6 unspecified": at("[::]"),
    "IPv6 unique local": at("[fc00::1]"),
    "IPv6 link-local": at("[fe80::1]"),
    "IPv6 multicast": at("[ff02::1]"),
    "IPv4-mapped": at("[::ffff:127.0.0.1]"),
    "IPv4-mapped in hex": at("[::ffff:7f00:1]"),
    "IPv4-mapped metadata": at("[::ffff:169.254.169.254]"),
    "IPv4-compatible": at("[::127.0.0.1]"),
    "IPv4-translated": at("[::ffff:0:127.0.0.1]"),
    "NAT64": at("[64:ff9b::127.0.0.1]"),
    "NAT64 metadata": at("[64:ff9b::a9fe:a9fe]"),
    "NAT64 local": at("[64:ff9b:1::127.0.0.1]"),
    "6to4": at("[2002:7f00:1::]"),
    "6to4 metadata": at("[2002:a9fe:a9fe::1]"),
    "Teredo": at("[2001:0:7f00:1::]"),
    "Teredo client": at("[2001:0:808:808::80ff:fffe]"),
    "ISATAP": at("[fe80::5efe:127.0.0.1]"),
    # How it is written.
    "decimal": at("2130706433"),
    "decimal metadata": at("2852039166"),
    "hex": at("0x7f000001"),
    "hex in capitals": at("0X7F000001"),
    "hex parts": at("0x7f.0.0.1"),
    "octal": at("017700000001"),
    "octal parts": at("0177.0.0.1"),
    "octal padded": at("0000177.0.0.01"),
    "short": at("127.1"),
    "shorter": at("0"),
    "mixed notations": at("0x7f.0.1"),
    "dot behind": at("127.0.0.1."),
    "dots behind": at("127.0.0.1.."),
    "percent digits": at("%31%32%37.0.0.1"),
    "percent dots": at("127%2e0%2e0%2e1"),
    "percent fullwidth": at("%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1"),
    "circled digits": Attack("http://①②⑦.⓪.⓪.①:{port}/"),
    "fullwidth digits": Attack("http://\uff11\uff12\uff17.0.0.1:{port}/"),
    "ideographic dots": Attack("http://127。0。0。1:{port}/"),
    "zero-width space": Attack("http://127.0.0.1\u200b:{port}/"),
    "soft hyphen": Attack("http://127.0.0.1\xad:{port}/"),
    "quotes": Attack(f'http://"{PRIVATE}":{{port}}/'),
    "percent name": at("%6cocalhost"),
    "fullwidth name": at("\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54"),
    "name in mathematical letters": at("\U0001d4c1ocalhost"),
    "underscore": at("in_ternal"),
    "backslash in the path": Attack(f"http://{PRIVATE}:{{port}}/\\\\public.test/"),
    # Names.
    "localhost": at("localhost"),
    "localhost with a dot": at("LOCALHOST."),
    "name": at("private.test"),
    "name over IPv6": at("ipv6.test"),
    "name of nothing": at("unspecified.test"),
    "name of a mapped address": at("mapped.test"),
    "name of a compatible address": at("compatible.test"),
    "name in NAT64": at("nat64.test"),
    "name in 6to4": at("6to4.test"),
    "name in Teredo": at("teredo.test"),
    "name of a link-local address": at("link-local.test"),
    "name of metadata": at("metadata.test"),
    "name of Azure": at("azure.test"),
    "name like an address": at("127.0.0.1.nip.test"),
    "name in punycode": at("xn--bcher-kva.test"),
    "name in bad punycode": at("xn--a-.test"),
    "single label": at("intranet"),
    "mixed records": at("mixed.test", "ok"),
    "mixed records backwards": at("mixed-backwards.test", "ok"),
    "mixed families": at("mixed-families.test", "ok"),
    "mixed with a mapped address": at("mixed-mapped.test", "ok"),
    "mixed at the end of many": at("many.test", "ok"),
    "rebinding": at("{one}.rebind.test"),
    "rebinding between redirects": Attack(
        "http://{one}.rebind.test:{port}/first", {"/first": to("/first")}
    ),
    "lookup that half fails": at("half.test", "ok"),
    # Scheme and port.
    "https": Attack(f"https://{PRIVATE}:{{tls}}/"),
    "https on the port of http": Attack(f"https://{PRIVATE}:{{port}}/"),
    "other port": Attack(f"http://{PUBLIC}:{{other}}/"),
    "other private port": Attack(f"http://{PRIVATE}:{{other}}/"),
    "padded port": Attack(f"http://{PRIVATE}:00000{{port}}/"),
    # Where one parser sees another host.
    "at in a fragment": Attack(f"http://public.test:{{port}}#@{PRIVATE}:{{port}}/"),
    "at in a query": Attack(f"http://public.test:{{port}}?@{PRIVATE}:{{port}}/"),
    "at in a path": Attack(f"http://public.test:{{port}}/@{PRIVATE}:{{port}}/"),
    "at behind": Attack(f"http://{PRIVATE}:{{port}}/@public.test"),
    "fragment as host": Attack(f"http://{PRIVATE}:{{port}}#@public.test:{{port}}/"),
    "query as host": Attack(f"http://{PRIVATE}:{{port}}?@public.test:{{port}}/"),
    "slashes": Attack(f"http://public.test:{{port}}//{PRIVATE}:{{port}}/"),
    "URL in the path": Attack(f"http://public.test:{{port}}/http://{PRIVATE}:{{port}}/"),
    "request in the path": Attack("http://public.test:{port}/%0d%0aHost:%20127.0.0.1"),
    # Redirects.
    **{f"redirect {code}": visit(to(TRAP, code)) for code in (301, 302, 303, 307, 308)},
    "redirect chain": visit(to("/b"), b=to("/c"), c=to("/d"), d=to(TRAP)),
    "redirect to a name": visit(to("http://private.test:{port}/")),
    "redirect to localhost": visit(to("http://localhost:{port}/")),
    "redirect to mixed records": visit(to("http://mixed.test:{port}/ok")),
    "redirect to metadata": visit(to("http://169.254.169.254:{port}/latest/meta-data/")),
    "redirect to IPv6": visit(to("http://[::1]:{port}/")),
    "redirect to a zone": visit(to("http://[fe80::1%25lo]:{port}/")),
    "redirect to a mapped address": visit(to("http://[::ffff:127.0.0.1]:{port}/")),
    "redirect to NAT64": visit(to("http://[64:ff9b::7f00:1]:{port}/")),
    "redirect to 6to4": visit(to("http://[2002:7f00:1::]:{port}/")),
    "redirect to decimal": visit(to("http://2130706433:{port}/")),
    "redirect to hex": visit(to("http://0x7f.1:{port}/")),
    "redirect to octal": visit(to("http://0177.0.0.1:{port}/")),
    "redirect to fullwidth digits": visit(to("http://\uff11\uff12\uff17.0.0.1:{port}/")),
    "redirect to circled digits": visit(to("http://①②⑦.⓪.⓪.①:{port}/")),
    "redirect to ideographic dots": visit(to("http://127。0。0。1:{port}/")),
    "redirect to https": visit(to(f"https://{PRIVATE}:{{tls}}/")),
    "redirect to another port": visit(to(f"http://{PUBLIC}:{{other}}/")),
    "redirect to ftp": visit(to(f"ftp://{PRIVATE}:{{port}}/")),
    "redirect to gopher": visit(to(f"gopher://{PRIVATE}:{{port}}/_GET%20/")),
    "redirect to file": visit(to("file:///etc/passwd")),
    "redirect to data": visit(to("data:text/plain,a")),
    "redirect with user info": visit(to(f"http://user:secret@{PUBLIC}:{{port}}/ok")),
    "redirect with a false user": visit(to(f"http://public.test:80@{PRIVATE}:{{port}}/")),
    "redirect without a scheme": visit(to(f"//{PRIVATE}:{{port}}/")),
    "redirect with slashes": visit(to(f"///{PRIVATE}:{{port}}/")),
    "redirect without slashes": visit(to(f"http:{PRIVATE}:{{port}}/")),
    "redirect with one slash": visit(to(f"http:/{PRIVATE}:{{port}}/")),
    "redirect with backslashes": visit(to(f"http:\\\\{PRIVATE}:{{port}}/")),
    "redirect with a backslash": visit(to(f"http://{PRIVATE}:{{port}}\\@public.test:{{port}}/")),
    "redirect with a tab": visit(to(f"ht\ttp://{PRIVATE}:{{port}}/")),
    "redirect with an empty host": visit(to("http://:{port}/")),
    "redirect to nonsense": visit(to("http://[")),
    "redirect to a long name": visit(to("http://" + "é." * 5000 + "test:{port}/")),
    "redirect to nowhere": visit(page(status(302))),
    "redirects in two ways": visit(page(redirect("/ok", f"Location: http://{PRIVATE}/"))),
    "redirect in a refusal": visit(
        lambda fill: redirect(fill(TRAP)).replace(b"302 Found", b"404 Not Found")
    ),
    "redirect by refreshing": visit(
        lambda fill: (
            f"HTTP/1.1 404 No\r\nRefresh: 0; url={fill(TRAP)}\r\nContent-Length: 0\r\n\r\n"
        ).encode()
    ),
    "redirect loop": visit(to("/first")),
    "redirect loop of two": visit(to("/b"), b=to("/first")),
    "too many redirects": visit(
        to("/r1"), **{f"r{n}": to(f"/r{n + 1}") for n in range(1, 5)}, r5=to("/ok")
    ),
    # Time.
    "silence": visit(page(silence)),
    "silent handshake": Attack(f"https://{PUBLIC}:{{tls}}/"),
    "silent name server": at("silent.test"),
    "redirect to a silent name server": visit(to("http://silent.test:{port}/")),
    "slow headers": visit(page(endless(b"HTTP/1.1 200 OK\r\na: ", b"b", pause=0.05))),
    "slow status": visit(page(endless(b"", b"H", pause=0.05))),
    "slow redirects": visit(page(slowly(3, redirect("/first")))),
    "slow interim responses": visit(
        page(endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.05))
    ),
    "slow body": visit(
        page(endless(b"HTTP/1.1 404 No\r\nContent-Length: 1000\r\n\r\n", b"a", pause=0.05))
    ),
    "slow body of a redirect": visit(
        page(
            endless(
                b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 1000\r\n\r\n", b"a", 0.05
            )
        ),
        b=page(status(404)),
    ),
    # Size.
    "endless header": visit(page(endless(b"HTTP/1.1 200 OK\r\na: ", b"b" * 1000))),
    "endless headers": visit(page(endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100))),
    "endless status": visit(page(endless(b"HTTP/1.1 200 ", b"b" * 1000))),
    "endless interim responses": visit(
        page(endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100))
    ),
    "endless body": visit(page(body("404 No"))),
    "endless body in chunks": visit(page(body("404 No", chunked=True))),
    "endless body of a redirect": visit(
        page(body("302 Found\r\nLocation: /b")), b=page(status(404))
    ),
    "zip bomb": visit(page(bomb("404 No"))),
    "zip bomb in a redirect": visit(
        lambda fill: bomb(f"302 Found\r\nLocation: {fill(TRAP)}"),
    ),
    # Other than HTTP.
    "hang up": visit(page(hang_up)),
    "no HTTP": visit(page(b"SSH-2.0-OpenSSH_9.9\r\n")),
    "HTTP 0.9": visit(page(b"<html>fine</html>")),
    "two lengths": visit(
        page(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\naa")
    ),
    "negative length": visit(page(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n")),
    "switching protocols": visit(
        page(b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")
    ),
    # The environment.
    "proxies": Attack(f"http://{PUBLIC}:{{port}}/gone", environment=PROXIES),
    "proxies for a name": Attack("http://public.test:{port}/gone", environment=PROXIES),
    "proxies for a trap": Attack(TRAP, environment=PROXIES),
    "no proxy for a trap": Attack(TRAP, environment=(*PROXIES, "NO_PROXY", "no_proxy")),
    "netrc": Attack(f"http://{PUBLIC}:{{port}}/gone", environment=("NETRC",)),
}


# What is no URL, or none that can be stored: rejected before anything is asked.
MALFORMED: dict[str, str] = {
    "user info": "http://user:secret@public.test:{port}/",
    "empty user info": f"http://@{PRIVATE}:{{port}}/",
    "false user": f"http://public.test:80@{PRIVATE}:{{port}}/",
    "fragment in user info": f"http://public.test%23@{PRIVATE}:{{port}}/",
    "two ats": f"http://a@public.test:80@{PRIVATE}:{{port}}/",
    "ftp": f"ftp://{PRIVATE}:{{port}}/",
    "file": "file:///etc/passwd",
    "file with a host": "file://localhost/etc/passwd",
    "gopher": f"gopher://{PRIVATE}:{{port}}/_GET%20/",
    "dict": f"dict://{PRIVATE}:{{port}}/info",
    "ldap": f"ldap://{PRIVATE}:{{port}}/",
    "ws": f"ws://{PRIVATE}:{{port}}/",
    "jar": f"jar:http://{PRIVATE}:{{port}}/!/",
    "view-source": f"view-source:http://{PRIVATE}:{{port}}/",
    "url": f"url:http://{PRIVATE}:{{port}}/",
    "data": "data:text/plain,a",
    "javascript": "javascript:alert(1)",
    "no scheme": f"//{PRIVATE}:{{port}}/",
    "no slashes": f"http:{PRIVATE}:{{port}}/",
    "one slash": f"http:/{PRIVATE}:{{port}}/",
    "three slashes": f"http:///{PRIVATE}:{{port}}/",
    "no host": "http://:{port}/",
    "port of a host of no use": "http://public.test:0/",
    "high port": "http://public.test:99999/",
    "port in letters": "http://public.test:http/",
    "two ports": f"http://{PRIVATE}:{{port}}:80/",
    "fullwidth slash": f"http://{PRIVATE}:{{port}}\uff0f.public.test/",
    "backslash": f"http://{PRIVATE}:{{port}}\\@public.test:{{port}}/",
    "backslashes": f"http:\\\\{PRIVATE}:{{port}}\\",
    "line break": f"http://public.test:{{port}}/\r\nHost: {PRIVATE}",
    "line break in the host": f"http://{PRIVATE}\r\n.public.test:{{port}}/",
    "tab": f"ht\ttp://{PRIVATE}:{{port}}/",
    "NUL": f"http://{PRIVATE}:{{port}}\0.public.test/",
    "space before": f" http://{PRIVATE}:{{port}}/",
    "space in the host": f"http://{PRIVATE} .public.test:{{port}}/",
    "open bracket": "http://[::1:{port}/",
    "no address in brackets": f"http://[{PRIVATE}]:{{port}}/",
    "IPv6 zone": "http://[fe80::1%25lo]:{port}/",
    "IPv6 zone on loopback": "http://[::1%25lo]:{port}/",
    "overflowing": "http://4425673729:{port}/",
    "five parts": "http://127.0.0.1.0:{port}/",
    "percent slash": f"http://{PRIVATE}%2fpublic.test:{{port}}/",
    "percent at": f"http://public.test%40{PRIVATE}:{{port}}/",
    "percent NUL": f"http://{PRIVATE}%00public.test:{{port}}/",
    "commas": f"http://public.test,{PRIVATE}:{{port}}/",
    "semicolons": f"http://public.test;{PRIVATE}:{{port}}/",
    "ampersands": f"http://public.test&{PRIVATE}:{{port}}/",
}
