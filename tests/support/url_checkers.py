"""Attachment URL checkers whose internet is on this machine."""

from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

import pytest
from ssrfguard import AddressTable, Block, Reach

from chat_ticket_svc.services import attachment_url_policy
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker
from support.sites import PUBLIC, Site

TENANT, ANOTHER = "a tenant", "another tenant"


NewChecker = Callable[..., AttachmentUrlChecker]


LONG_TIMEOUT = {"timeout": 60}  # enough on a busy machine


def checker_allowing(*sites: Site, **settings: Any) -> AttachmentUrlChecker:
    """A checker for which these sites are internal stores."""
    hosts = [site.at for site in sites]
    return AttachmentUrlChecker(
        schemes=("http",), allowed_hosts=hosts, **{**LONG_TIMEOUT, **settings}
    )


def open_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes PUBLIC a public address."""
    public = Block(ip_network(PUBLIC), "Public", "", Reach.PERMITTED)
    denied = AddressTable((*attachment_url_policy.DENIED_NETWORKS.blocks, public))
    monkeypatch.setattr(attachment_url_policy, "DENIED_NETWORKS", denied)
