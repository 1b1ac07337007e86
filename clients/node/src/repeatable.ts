type Fields = Record<string, any> | undefined

/** Throws a TypeError for a request that could do something else when it is sent again. */
export function requireRepeatable(type: string, request: Fields): void {
  switch (type) {
    case 'CreateChatSessionRequest':
      return requireId('session.id', request?.session?.id)
    case 'CreateChatMessageRequest':
      return requireId('message.id', request?.message?.id)
    case 'BatchCreateChatMessagesRequest':
      return (request?.messages ?? []).forEach((message: Fields, index: number) =>
        requireId(`messages[${index}].id`, message?.id),
      )
    case 'CreateChatAttachmentRequest':
      return requireId('attachment.id', request?.attachment?.id)
    case 'CreateChatTicketRequest': {
      const ticketId = request?.target?.$case === 'ticket' ? request.target.value?.id : undefined
      return requireId('chatTicketId', request?.chatTicketId || ticketId)
    }
    case 'CreateTicketRequest':
      return requireId('ticket.id', request?.ticket?.id)
    case 'UpdateChatSessionRequest':
      return requireNoEtag('session.etag', request?.session?.etag)
    case 'UpdateChatMessageRequest':
      return requireNoEtag('message.etag', request?.message?.etag)
    case 'UpdateTicketRequest':
      return requireNoEtag('ticket.etag', request?.ticket?.etag)
  }
}

function requireId(field: string, value: string | undefined): void {
  if (!value) throw new TypeError(`${field}: must be set in a call that is retried, so that it creates once`)
}

function requireNoEtag(field: string, value: string | undefined): void {
  if (value) {
    throw new TypeError(
      `${field}: must be empty in a call that is retried: when an attempt succeeds and its answer is lost, ` +
        'the next one fails with ETAG_MISMATCH',
    )
  }
}
