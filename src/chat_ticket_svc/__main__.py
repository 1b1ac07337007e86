"""`python -m chat_ticket_svc`: the command line."""

from chat_ticket_svc.cli import main

main()
