"""SearchChatMessages, through all of its pages."""

from chat_ticket.v1.chat_message_pb2 import SearchChatMessagesRequest, SearchChatMessagesResponse
from support.client import Api

Hit = SearchChatMessagesResponse.Hit


async def search(api: Api, query: str, **filters: object) -> list[Hit]:
    """The hits on all pages."""
    hits: list[Hit] = []
    request = SearchChatMessagesRequest(query=query, **filters)  # type: ignore[arg-type]
    while True:
        page = await api.messages.SearchChatMessages(request)
        hits += page.hits
        request.page_token = page.next_page_token
        if not request.page_token:
            return hits


async def every_page(
    api: Api, query: str, *, page_size: int = 1000, **filters: object
) -> tuple[list[Hit], bool]:
    """The hits of all pages, and whether they are incomplete; all pages agree."""
    hits: list[Hit] = []
    incomplete = set()
    token = ""
    while token or not incomplete:
        page = await api.messages.SearchChatMessages(
            SearchChatMessagesRequest(
                query=query,
                page_size=page_size,
                page_token=token,
                **filters,  # type: ignore[arg-type]
            )
        )
        hits += page.hits
        incomplete.add(page.incomplete_results)
        token = page.next_page_token
    [is_incomplete] = incomplete
    return hits, is_incomplete
