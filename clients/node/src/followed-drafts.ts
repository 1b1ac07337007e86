import type { WatchChatSessionResponse } from './generated/chat_ticket/v1/chat_session.js'

/** A revision of a session, and the history that it belongs to. */
export type Position = Pick<WatchChatSessionResponse, 'revision' | 'epoch'>

/**
 * The drafts that the caller of a watch has, and how much of each.
 *
 * Each stream begins with all open drafts, as they stand. The caller gets what is new in them, and
 * the end of those that are open no more.
 */
export class FollowedDrafts {
  // In bytes of UTF-8. Text is only ever added to a draft, so its length says what is known.
  readonly #lengths = new Map<string, bigint>()
  // Of earlier streams, and not seen in this one.
  #unseen = new Set<string>()

  beginStream(): void {
    this.#unseen = new Set(this.#lengths.keys())
  }

  /** The ends of drafts that the response implies, to be delivered before it. */
  endedBefore({ event }: WatchChatSessionResponse, position: Position): WatchChatSessionResponse[] {
    switch (event?.$case) {
      case 'messagesCreated':
        return this.#ended(event.value.messages.map(({ id }) => id), position)
      case 'messageDeleted':
        return this.#ended([event.value.messageId], position)
      case 'caughtUp': // all open drafts were before it
        return this.#ended([...this.#unseen], position)
      default:
        return []
    }
  }

  /** The ends of all drafts: the session is gone. */
  allEnded(position: Position): WatchChatSessionResponse[] {
    return this.#ended([...this.#lengths.keys()], position)
  }

  /** The event to deliver. Undefined for what the caller has already. */
  next(response: WatchChatSessionResponse): WatchChatSessionResponse | undefined {
    const { event, revision, epoch } = response
    switch (event?.$case) {
      case 'draft': {
        const { id: draftId, content, length } = event.value
        const known = this.#lengths.get(draftId)
        this.#unseen.delete(draftId)
        this.#lengths.set(draftId, length)
        // Less than known is what a failover has left of it.
        if (known === undefined || length < known) return response
        if (length === known) return undefined
        const text = Buffer.from(content).subarray(Number(known)).toString()
        return { revision, epoch, event: { $case: 'draftAppended', value: { draftId, offset: known, text } } }
      }
      case 'draftAppended': {
        const { draftId, offset, text } = event.value
        this.#lengths.set(draftId, offset + BigInt(Buffer.byteLength(text)))
        return response
      }
      case 'draftEnded':
        this.#unseen.delete(event.value.draftId)
        return this.#lengths.delete(event.value.draftId) ? response : undefined
      default:
        return response
    }
  }

  #ended(draftIds: string[], position: Position): WatchChatSessionResponse[] {
    return draftIds.flatMap((draftId) => {
      this.#unseen.delete(draftId)
      if (!this.#lengths.delete(draftId)) return []
      return [{ ...position, event: { $case: 'draftEnded' as const, value: { draftId } } }]
    })
  }
}
