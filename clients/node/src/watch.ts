import { isDeepStrictEqual } from 'node:util'

import type { ChatTicketError } from './errors.js'
import { ChatTicket, type ChatSession } from './generated/chat_ticket/v1/resources.js'
import type { WatchChatSessionRequest, WatchChatSessionResponse } from './generated/chat_ticket/v1/chat_session.js'
import { FollowedDrafts, type Position } from './followed-drafts.js'
import type { Progress } from './resume.js'

// Three heartbeats at the server's default interval.
export const SILENCE_MS = 45_000

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
  /** The `epoch` that came with `afterRevision`. Empty by default, which does not check that it is still true. */
  epoch?: string | undefined
  /** Whether the watch also shows the messages that are being written. False by default. */
  includeDrafts?: boolean | undefined
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

/** What has been delivered of a watch. */
export class WatchProgress implements Progress<WatchChatSessionResponse, WatchEvent> {
  readonly #sessionId: string
  readonly #includeDrafts: boolean
  readonly #state: ResumeState
  readonly #drafts = new FollowedDrafts()
  #isAtStart = true // of a stream

  constructor(sessionId: string, position: Position, includeDrafts: boolean) {
    this.#sessionId = sessionId
    this.#includeDrafts = includeDrafts
    this.#state = new ResumeState(position)
  }

  get revision(): bigint {
    return this.#state.position.revision
  }

  get hasEnded(): boolean {
    return this.#state.isDeleted
  }

  /** The request of the next stream. */
  nextRequest(): Partial<WatchChatSessionRequest> {
    this.#drafts.beginStream()
    this.#isAtStart = true
    return {
      sessionId: this.#sessionId,
      afterRevision: this.#state.position.revision,
      epoch: this.#state.position.epoch,
      includeDrafts: this.#includeDrafts,
    }
  }

  items(response: WatchChatSessionResponse): readonly WatchEvent[] {
    const position = this.#state.position
    const ended = this.#drafts.endedBefore(response, position)
    let event = this.#state.next(response)
    if (event !== undefined) event = this.#drafts.next(event)
    if (this.#state.isDeleted) ended.push(...this.#drafts.allEnded(position))
    const unlinked = this.#isAtStart ? this.#state.unlinked(response) : []
    this.#isAtStart = false
    return [...ended, ...(event === undefined ? [] : [event]), ...unlinked]
  }

  onStreamEnd(): void {} // it ends by itself only after sessionDeleted, or when a proxy ends it

  onNotFound(): readonly WatchEvent[] {
    if (this.#state.session === undefined) return []
    return [...this.#drafts.allEnded(this.#state.position), this.#state.deleted()]
  }
}

function positionOf({ revision, epoch }: WatchChatSessionResponse): Position {
  return { revision, epoch }
}

/** Whether the session shows nothing new. Its other fields change with every message, which has an event of its own. */
function isKnown(previous: ChatSession, session: ChatSession): boolean {
  return (
    previous.status === session.status &&
    previous.hasTicket === session.hasTicket &&
    previous.title === session.title &&
    isDeepStrictEqual(previous.labels, session.labels)
  )
}

/** What has been delivered to the caller of a watch, over all of its streams. */
class ResumeState {
  position: Position
  session: ChatSession | undefined
  isDeleted = false
  #isCaughtUp = false
  // As delivered last. Empty while the session is linked to none.
  #ticket = ChatTicket.fromPartial({})

  constructor(position: Position) {
    this.position = position
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
        if (previous && isKnown(previous, session)) event = undefined
        this.session = session
        break
      }
      case 'ticket': {
        if (isDeepStrictEqual(response.event.value, this.#ticket)) event = undefined
        this.#ticket = response.event.value
        break
      }
      case 'caughtUp':
        if (this.#isCaughtUp) {
          // The caller has caught up before. The position may have moved, which a heartbeat reports.
          event =
            response.revision === this.position.revision && response.epoch === this.position.epoch
              ? undefined
              : { ...positionOf(response), event: { $case: 'heartbeat', value: {} } }
        }
        this.#isCaughtUp = true
        break
      case 'sessionDeleted':
        this.isDeleted = true
        break
    }
    this.position = positionOf(response)
    return event
  }

  /**
   * The event that an unbroken stream has had, for a ticket that is gone. `response` is the first of a stream. A new
   * stream does not say that the session was unlinked meanwhile: it begins with a session without a ticket.
   */
  unlinked(response: WatchChatSessionResponse): readonly WatchEvent[] {
    const isUnlinked = response.event?.$case === 'session' && !response.event.value.hasTicket
    if (this.isDeleted || !isUnlinked || !this.#ticket.id) return []
    this.#ticket = ChatTicket.fromPartial({})
    return [{ ...this.position, event: { $case: 'ticket', value: this.#ticket } }]
  }

  /** The event that the server would have sent on an unbroken stream. */
  deleted(): WatchEvent {
    this.isDeleted = true
    return { ...this.position, event: { $case: 'sessionDeleted', value: {} } }
  }
}
