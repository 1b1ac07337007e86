import { setTimeout as sleep } from 'node:timers/promises'

import { credentials } from '@grpc/grpc-js'

import { isRetryable, pauseMs } from './backoff.js'
import { Connection, leavable, requestTypeOf, type Calls, type CallOptions } from './calls.js'
import { ChatAttachmentServiceDefinition } from './generated/chat_ticket/v1/chat_attachment.js'
import { ChatDraftServiceDefinition } from './generated/chat_ticket/v1/chat_draft.js'
import { ChatMessageServiceDefinition } from './generated/chat_ticket/v1/chat_message.js'
import { ChatSessionServiceDefinition } from './generated/chat_ticket/v1/chat_session.js'
import { ChatTicketServiceDefinition } from './generated/chat_ticket/v1/chat_ticket.js'
import type { ChatMessage } from './generated/chat_ticket/v1/resources.js'
import { ListProgress, type MessagesOfOptions } from './messages.js'
import type { ClientOptions } from './options.js'
import { requireRepeatable } from './repeatable.js'
import { resumed } from './resume.js'
import { isLoopbackTarget } from './target.js'
import { SILENCE_MS, WatchProgress, type WatchEvent, type WatchOptions } from './watch.js'

export interface RetryOptions {
  /** How long to try. 60,000 by default. */
  timeoutMs?: number | undefined
  /** Ends the call and the retries. It then rejects with the reason of the signal. */
  signal?: AbortSignal | undefined
}

/**
 * The service, for one tenant. Close it when it is no longer used.
 *
 *     const client = new ChatTicketClient('localhost:50051', { tenant: 'acme' })
 *     const { session } = await client.sessions.createChatSession({})
 *     for await (const { event } of client.watch(session.id)) ...
 *
 * Calls with one response return a promise. `messages.listChatMessages`, `sessions.watchChatSession`
 * and `drafts.writeChatDraft` return an async generator. The last one takes its requests as an
 * (async) iterable. A call that fails throws a `ChatTicketError`. gRPC itself retries reads that
 * fail with UNAVAILABLE, until their deadline. Writes are not retried: use `retry`.
 *
 * The client has connections of its own, and one more for every 50 open streams. So calls with one
 * response do not wait behind streams, and the number of streams is limited by quotas only.
 *
 * The constructor throws a TypeError for a token that would be sent in plain text to another
 * machine, and for a tenant or token that is not printable ASCII.
 */
export class ChatTicketClient {
  readonly sessions: Calls<typeof ChatSessionServiceDefinition>
  readonly messages: Calls<typeof ChatMessageServiceDefinition>
  readonly drafts: Calls<typeof ChatDraftServiceDefinition>
  readonly attachments: Calls<typeof ChatAttachmentServiceDefinition>
  readonly tickets: Calls<typeof ChatTicketServiceDefinition>

  readonly #connection: Connection

  constructor(target: string, options: ClientOptions = {}) {
    const channel = options.credentials ?? credentials.createInsecure()
    if (options.token !== undefined && !channel._isSecure() && !isLoopbackTarget(target)) {
      throw new TypeError(`token: not sent in plain text to ${target}; set credentials`)
    }
    this.#connection = new Connection(target, channel, options)
    this.sessions = this.#connection.calls(ChatSessionServiceDefinition)
    this.messages = this.#connection.calls(ChatMessageServiceDefinition)
    this.drafts = this.#connection.calls(ChatDraftServiceDefinition)
    this.attachments = this.#connection.calls(ChatAttachmentServiceDefinition)
    this.tickets = this.#connection.calls(ChatTicketServiceDefinition)
  }

  /** Ends all calls and watches, and closes the connections. */
  close(): void {
    this.#connection.close()
  }

  /**
   * Repeats a call until its outcome is known, for up to `timeoutMs`. Then throws the last error.
   *
   *     await client.retry(client.messages.createChatMessage, request)
   *
   * Use it for calls that are safe to repeat: reads, deletes, updates without an etag, and creates
   * whose request sets the ids. It throws a TypeError, before anything is sent, for a create without
   * them and an update with an etag, when `method` is one of the client's. The ids are `session.id`,
   * `message.id`, `messages[i].id`, `attachment.id`, and `chatTicketId` or that of the new ticket. A
   * repeated delete without `allowMissing` fails with NOT_FOUND when the first attempt succeeded.
   *
   * The call is repeated when it fails with UNAVAILABLE, DEADLINE_EXCEEDED or CANCELLED, with INTERNAL
   * or UNKNOWN without a reason, or with an error that has `retrySeconds`: after a pause, and not
   * before `retrySeconds`. `method` is called with the `signal` and a `timeoutMs` of at most what is
   * left.
   */
  async retry<Request, Response>(
    method: (request: Request, options?: CallOptions) => Promise<Response>,
    request: NoInfer<Request>,
    { timeoutMs = 60_000, signal }: RetryOptions = {},
  ): Promise<Response> {
    const requestType = requestTypeOf(method)
    if (requestType) requireRepeatable(requestType, request as Record<string, unknown>)
    const longest = requestType ? this.#connection.timeoutMs : Infinity
    const end = performance.now() + timeoutMs
    const ending = anyOf(signal, this.#connection.closing)
    for (let failures = 0; ; failures += 1) {
      try {
        return await method(request, { signal, timeoutMs: Math.min(longest, end - performance.now()) })
      } catch (error) {
        if (!isRetryable(error)) throw error
        const pause = pauseMs(failures, error)
        if (performance.now() + pause > end) throw error
        await sleep(pause, undefined, { signal: ending }).catch(() => ending.throwIfAborted())
      }
    }
  }

  /**
   * Watches a session: what changed after a revision, then every change as it happens.
   *
   * The watch resumes after the last event when the stream breaks. It does so when the server stops
   * or is unreachable, when a token expires that comes from a function, and when the server sends
   * nothing for `silenceMs`. It tries for as long as that takes, and calls `onInterruption` each time.
   *
   * Each event is delivered once, and none is left out. The session comes first, in its current
   * state, and again after an interruption when its status or `hasTicket` has changed. It may
   * therefore be ahead of the events that led to it. Those follow, up to its `revision`.
   *
   * With `includeDrafts`, the watch also shows the messages that are being written: `draft`,
   * `draftAppended` and `draftEnded`. These events continue over an interruption as well. What a
   * draft has gained meanwhile comes as `draftAppended`, and a draft that has ended as `draftEnded`,
   * just before its message.
   *
   * To resume in another process, store the `revision` and the `epoch` of each event after the event
   * has been fully handled, and pass them as `afterRevision` and `epoch`. A partly handled event is
   * then delivered again in full.
   *
   * The watch ends after `sessionDeleted`, also when the session was deleted during an
   * interruption. Leaving the loop, calling `return()` on the generator or aborting `signal` ends
   * the stream at the server.
   *
   * Throws errors that a retry cannot resolve: NOT_FOUND when there is no such session, OUT_OF_RANGE for a
   * revision that it has not reached, INVALID_ARGUMENT, PERMISSION_DENIED, UNAUTHENTICATED,
   * UNIMPLEMENTED, and INTERNAL with a reason. OUT_OF_RANGE with the reason HISTORY_CHANGED means that the
   * database has lost changes that were delivered. What came after the `revision` of its metadata is no
   * more, or is different. Discard the state and watch from 0, or go on after that revision with the `epoch`
   * of the metadata.
   */
  watch(sessionId: string, options: WatchOptions = {}): AsyncGenerator<WatchEvent, void, void> {
    const { renewsToken, closing } = this.#connection
    const { epoch = '', includeDrafts = false, silenceMs = SILENCE_MS, onInterruption } = options
    return leavable((signal) => {
      const position = { revision: BigInt(options.afterRevision ?? 0n), epoch }
      const progress = new WatchProgress(sessionId, position, includeDrafts)
      return resumed((each) => this.sessions.watchChatSession(progress.nextRequest(), { signal: each }), progress, {
        renewsToken,
        signal,
        silenceMs,
        onBreak: (broken) => onInterruption?.({ revision: progress.revision, ...broken }),
      })
    }, anyOf(options.signal, closing))
  }

  /**
   * The messages of a session after a sequence, in order, each exactly once.
   *
   *     for await (const message of client.messagesOf(sessionId)) ...
   *
   * It is one ListChatMessages stream that does not break: it resumes after the last message when the
   * server stops or is unreachable, when the connection ends (a server may limit its age), and when
   * a token expires that comes from a function. It ends where the first stream would have: at the
   * messages that existed when it began. When nothing arrives for `timeoutMs` in spite of retries, the
   * last error is thrown.
   *
   * Throws the errors that a retry cannot resolve, as `watch` does: NOT_FOUND also when the session is
   * deleted meanwhile.
   */
  messagesOf(sessionId: string, options: MessagesOfOptions = {}): AsyncGenerator<ChatMessage, void, void> {
    const { renewsToken, closing } = this.#connection
    const { afterSequence = 0n, timeoutMs = 60_000 } = options
    return leavable((signal) => {
      const progress = new ListProgress(sessionId, BigInt(afterSequence))
      return resumed((each) => this.messages.listChatMessages(progress.request, { signal: each }), progress, {
        renewsToken,
        signal,
        silenceMs: Math.min(SILENCE_MS, timeoutMs),
        timeoutMs,
      })
    }, anyOf(options.signal, closing))
  }
}

const anyOf = (signal: AbortSignal | undefined, other: AbortSignal) =>
  signal ? AbortSignal.any([signal, other]) : other
