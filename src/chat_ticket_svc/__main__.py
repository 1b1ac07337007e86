"""The start of the program, by `chat-ticket-svc` or `python -m chat_ticket_svc`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # During the imports Ctrl-C ends the process at once, instead of by a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from chat_ticket_svc.cli import main

if __name__ == "__main__":
    main()
