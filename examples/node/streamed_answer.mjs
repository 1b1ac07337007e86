// An answer that others read while a model writes it, and that somebody stops.
//
// Start the service by `make run`, and then, in another terminal:
//
//   make node-client     (once: it builds the package that this program imports)
//   node examples/node/streamed_answer.mjs [ADDRESS]
//
// ADDRESS is localhost:50051 by default. The model is a fake, which never comes to an end. A reader
// is cut off, comes back, and has missed nothing. At last another process stops the answer: this
// program again, as `streamed_answer.mjs ADDRESS stop DRAFT_ID`.
import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

// In your own project, install the package and import it: from 'chat-ticket-client'
import { ChatTicketClient, ChatTicketError } from '../../clients/node/dist/index.js'

// For a remote server add `token` and `credentials: credentials.createSsl()`.
const connect = (address) => new ChatTicketClient(address, { tenant: 'acme' })

/** A model that streams words, and does not know when to stop. */
async function* generate() {
  try {
    for (let number = 1; ; number += 1) {
      await sleep(30)
      yield `${number} sheep, `
    }
  } finally {
    // Here the stream of a real model is closed, so that it costs nothing more.
    console.log('model: closed')
  }
}

/** Writes what the model says, until it ends or somebody stops it. Returns the message. */
async function answer(client, sessionId) {
  // The id is chosen once: whatever breaks, the same start goes on with the same draft.
  const draft = { id: randomUUID(), role: 'CHAT_MESSAGE_ROLE_ASSISTANT' }
  let content = Buffer.alloc(0)
  let [isComplete, isOver] = [false, false]
  const reading = (async () => {
    for await (const words of generate()) {
      if (isOver) return
      content = Buffer.concat([content, Buffer.from(words)])
    }
    isComplete = true
  })()

  async function* requests(started) {
    yield { request: { $case: 'start', value: { sessionId, draft, exclusive: true } } }
    let offset = await started
    while (!isOver && !(isComplete && offset === content.length)) {
      // Without text it shows that the writer is alive: the server wants a sign every 60 seconds.
      const text = content.subarray(offset).toString()
      yield { request: { $case: 'append', value: { offset: BigInt(offset), text } } }
      offset += Buffer.byteLength(text)
      await sleep(50)
    }
    yield { request: { $case: 'finish', value: {} } }
  }

  for (;;) {
    let start
    const started = new Promise((resolve) => (start = resolve))
    try {
      for await (const { response } of client.drafts.writeChatDraft(requests(started))) {
        if (response.$case === 'started') start(Number(response.value.length))
        if (response.$case === 'stopped' || response.$case === 'finished') {
          isOver = true
          await reading
          return response.value.message
        }
      }
    } catch (error) {
      const canRetry = error instanceof ChatTicketError && ['UNAVAILABLE', 'CANCELLED'].includes(error.codeName)
      if (!canRetry && error.retrySeconds === undefined) {
        isOver = true
        throw error
      }
    }
    await sleep(200) // then resume, on any server
  }
}

/** What somebody sees on a screen: the text of the draft, and at last the message. */
class Reader {
  revision = 0n
  draftId = ''
  text = Buffer.alloc(0)
  message = undefined

  /** Reads so many more bytes, or up to the message. */
  async read(address, sessionId, more) {
    const client = connect(address)
    const enough = this.text.length + more
    const options = { afterRevision: this.revision, includeDrafts: true }
    for await (const { event, revision } of client.watch(sessionId, options)) {
      switch (event?.$case) {
        case 'draft': // as a whole: when it begins, and when we come back
          this.draftId = event.value.id
          this.text = Buffer.from(event.value.content)
          break
        case 'draftAppended': {
          const before = this.text.subarray(0, Number(event.value.offset))
          this.text = Buffer.concat([before, Buffer.from(event.value.text)])
          break
        }
        case 'messagesCreated':
          this.message = event.value.messages[0]
          break
      }
      this.revision = revision
      if (this.message || this.text.length >= enough) break
    }
    client.close()
  }
}

async function main(address) {
  const client = connect(address)
  const sessionId = randomUUID()
  await client.retry(client.sessions.createChatSession, { session: { id: sessionId } })

  const answering = answer(client, sessionId)
  const reader = new Reader()
  await reader.read(address, sessionId, 100)
  console.log(`reader: ${reader.text.subarray(0, 24)}…`)
  console.log('reader: cut off')
  const before = reader.text
  await sleep(200)
  await reader.read(address, sessionId, 100)
  console.log(`reader: back, with all that came before: ${reader.text.subarray(0, before.length).equals(before)}`)

  const command = [fileURLToPath(import.meta.url), address, 'stop', reader.draftId]
  const stopping = spawn(process.execPath, command, { stdio: 'inherit' })
  const [message] = await Promise.all([answering, once(stopping, 'exit')])
  console.log(`writer: ${message.state}`)
  await reader.read(address, sessionId, Infinity)
  console.log(`reader: the message is that of the writer: ${reader.message.content === message.content}`)
  client.close()
}

async function stop(address, draftId) {
  const client = connect(address)
  await client.retry(client.drafts.stopChatDraft, { draftId })
  client.close()
}

const [address = 'localhost:50051', command, draftId] = process.argv.slice(2)
if (command === 'stop') await stop(address, draftId)
else await main(address)
