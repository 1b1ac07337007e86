import { setTimeout as sleep } from 'node:timers/promises'

import { status } from '@grpc/grpc-js'

import { isRetryable, pauseMs } from './backoff.js'
import type { StreamCall } from './calls.js'
import { ChatTicketError } from './errors.js'
import type { ChatSession } from './generated/chat_ticket/v1/resources.js'
import type { WatchChatSessionRequest, WatchChatSessionResponse } from './generated/chat_ticket/v1/chat_session.js'

// Three heartbeats at the server's default interval.
const SILENCE_MS = 45_000

// A token may expire on its way to the server. After this many expired tokens in a row the next one
// ends the watch.
const MAX_EXPIRED_TOKENS = 3

/** An event of a watched session: what happened, and the position after it. */
export type WatchEvent = WatchChatSessionResponse

/** Why and when a watch resumes. */
export interface WatchInterruption {
  /** The revision after which the watch resumes. */
  revision: bigint
  /** How many attempts in a row have failed without an event, before this one. */
  failures: number
  /** How long the watch waits before it resumes. */
  pauseMs: number
  /** The error that ended the stream. Undefined when the stream ended without one or was silent for too long. */
  error: ChatTicketError | undefined
  /** The reason as text, also when there is no `error`. */
  message: string
}

export interface WatchOptions {
  /** Watch the changes after this revision. 0 by default, which starts with the whole history. */
  afterRevision?: bigint | number | string | undefined
  /**
   * Start a new stream when the server sends nothing for this long. 45,000 by default. The server
   * sends a heartbeat every 15 seconds by default.
   */
  silenceMs?: number | undefined
  /** Ends the watch, which then throws the reason of the signal. */
  signal?: AbortSignal | undefined
  /** Called before each pause and resume, for example to log it. */
  onInterruption?: ((interruption: WatchInterruption) => void) | undefined
}

type Watch = StreamCall<Partial<WatchChatSessionRequest>, WatchChatSessionResponse>

/** Watches a session, with a new stream after each interruption. See ChatTicketClient.watch. */
export async function* watchSession(
  watch: Watch,
  sessionId: string,
  renewsToken: boolean,
  signal: AbortSignal,
  { afterRevision = 0n, silenceMs = SILENCE_MS, onInterruption }: WatchOptions,
): AsyncGenerator<WatchEvent, void, void> {
  const state = new ResumeState(BigInt(afterRevision))
  let expiredTokens = 0
  for (let failures = 0; ; failures += 1) {
    const silence = new AbortController()
    const responses = watch(
      { sessionId, afterRevision: state.revision },
      { signal: AbortSignal.any([signal, silence.signal]) },
    )
    let failure: ChatTicketError | undefined
    let message: string
    try {
      for (;;) {
        const timer = setTimeout(() => silence.abort(), silenceMs)
        const { done, value: response } = await responses.next().finally(() => clearTimeout(timer))
        if (done) {
          message = 'the stream ended'
          break
        }
        expiredTokens = 0
        const event = state.next(response)
        if (event !== undefined) {
          failures = 0
          yield event
        }
        if (state.isDeleted) return
      }
    } catch (error) {
      signal.throwIfAborted()
      if (silence.signal.aborted) {
        message = `the server sent nothing for ${silenceMs} ms`
      } else if (!(error instanceof ChatTicketError)) {
        throw error
      } else if (error.code === status.NOT_FOUND && state.session !== undefined) {
        yield state.deleted()
        return
      } else {
        const isExpired = renewsToken && error.reason === 'CREDENTIAL_EXPIRED'
        expiredTokens = isExpired ? expiredTokens + 1 : 0
        if (!isRetryable(error) && (!isExpired || expiredTokens > MAX_EXPIRED_TOKENS)) throw error
        failure = error
        message = error.message
      }
    } finally {
      await responses.return()
    }
    const pause = pauseMs(failures, failure)
    onInterruption?.({ revision: state.revision, failures, pauseMs: pause, error: failure, message })
    await sleep(pause, undefined, { signal }).catch(() => signal.throwIfAborted())
  }
}

/** What has been delivered to the caller of a watch, over all of its streams. */
class ResumeState {
  revision: bigint
  session: ChatSession | undefined
  isDeleted = false
  #isCaughtUp = false

  constructor(revision: bigint) {
    this.revision = revision
  }

  /** The event to deliver for a response. Undefined for one that only repeats the state after a resume. */
  next(response: WatchChatSessionResponse): WatchEvent | undefined {
    let event: WatchEvent | undefined = response
    switch (response.event?.$case) {
      case 'session': {
        const session = response.event.value
        const previous = this.session
        // A later session with the same id: the watched one was deleted.
        if (previous && previous.createTime?.getTime() !== session.createTime?.getTime()) return this.deleted()
        // Its revision and times change with every message, which has an event of its own.
        if (previous?.status === session.status && previous.hasTicket === session.hasTicket) event = undefined
        this.session = session
        break
      }
      case 'caughtUp':
        if (this.#isCaughtUp) {
          // The caller has caught up before. The position may have moved, which a heartbeat reports.
          event =
            response.revision === this.revision
              ? undefined
              : { revision: response.revision, event: { $case: 'heartbeat', value: {} } }
        }
        this.#isCaughtUp = true
        break
      case 'sessionDeleted':
        this.isDeleted = true
        break
    }
    this.revision = response.revision
    return event
  }

  /** The event that the server would have sent on an unbroken stream. */
  deleted(): WatchEvent {
    this.isDeleted = true
    return { revision: this.revision, event: { $case: 'sessionDeleted', value: {} } }
  }
}
